"""Adapters of every method on a base: attached, pruned, detached, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from qlora_service.errors import InvalidSpec
from qlora_service.models.adapters import (
    allocation_state,
    attach_adapter,
    checkpoint_activations,
    detach,
    disable_dropout,
    load_adapter,
    needs_own_row,
    orthogonality_loss,
    prune_after_step,
    restore_allocation,
    save_adapter,
    trainable_parameters,
)
from qlora_service.models.base.quantize import base_fingerprint, dequantized_weight, load_base
from qlora_service.specs import Adapter, LlamaAdapter, Lora, PrefixTuning, PromptTuning, Quantization, Vera
from tests.qlora_service.models.adapter_cases import ADALORA, CPU, IDS, METHODS, OLORA, load, logits, train

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def test_new_adapter_keeps_the_outputs_of_the_base_bit_for_bit(tiny_model: Path) -> None:
    base = load_base(tiny_model, Quantization(), torch.bfloat16, CPU)
    before = base_fingerprint(base)
    assert base_fingerprint(attach_adapter(base, Lora(), seed=0)) == before


def test_only_the_adapter_is_trainable_and_it_is_float32(tiny_model: Path) -> None:
    model = load(tiny_model, Lora(r=4, target_modules=["q_proj", "v_proj"]), dtype=torch.bfloat16)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 2 * 2
    assert all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in names)
    assert {parameter.dtype for parameter in trainable_parameters(model)} == {torch.float32}


def test_seed_decides_the_initial_values_of_a(tiny_model: Path) -> None:
    first, same, other = (
        attach_adapter(load_base(tiny_model, Quantization(), torch.float32, CPU), Lora(), seed) for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(trainable_parameters(first), trainable_parameters(same), strict=True))
    assert not torch.equal(trainable_parameters(first)[0], trainable_parameters(other)[0])


def test_a_target_that_does_not_exist_is_refused(tiny_model: Path) -> None:
    with pytest.raises(InvalidSpec, match="nowhere_proj"):
        load(tiny_model, Lora(target_modules=["nowhere_proj"]))


def test_dropout_of_the_base_is_off(tiny_model: Path) -> None:
    base = load_base(tiny_model, Quantization(), torch.float32, CPU)
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model = attach_adapter(base, Lora(), seed=0).train()
    assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_dropout_layers_of_the_base_are_off() -> None:
    base = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4)).train()
    disable_dropout(base)
    assert torch.equal(base(IDS).logits, base(IDS).logits)


@pytest.mark.parametrize("adapter", METHODS, ids=lambda adapter: adapter.method)
def test_disabled_or_detached_adapter_leaves_the_base_unchanged(adapter: Adapter, tiny_model: Path) -> None:
    base = load_base(tiny_model, Quantization(), torch.bfloat16, CPU)
    expected, before, names = logits(base), base_fingerprint(base), [name for name, _ in base.named_parameters()]
    model = attach_adapter(base, adapter, seed=0, total_steps=4)
    train(model, range(1, 3))
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    detached = detach(model)
    assert base_fingerprint(detached) == before
    assert [name for name, _ in detached.named_parameters()] == names


def test_only_prompt_methods_run_alone(tiny_model: Path) -> None:
    alone = {adapter.method for adapter in METHODS[-5:] if needs_own_row(load(tiny_model, adapter))}
    assert alone == {"prompt_tuning", "prefix_tuning", "p_tuning"}


def test_prefix_tuning_does_not_recompute_activations(tiny_model: Path) -> None:
    assert checkpoint_activations(load(tiny_model, PrefixTuning(method="prefix_tuning"))) is False
    assert checkpoint_activations(load(tiny_model, PromptTuning(method="prompt_tuning"))) is True


def test_a_tied_embedding_and_head_share_one_adapter(tiny_model: Path, tmp_path: Path) -> None:
    model = load(tiny_model, Lora(r=4, target_modules=["embed_tokens"]), steps=2)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert torch.equal(embedding.get_delta_weight("default"), head.get_delta_weight("default"))
    save_adapter(model, tmp_path, "base", None)
    saved = load_file(tmp_path / WEIGHTS)
    assert saved
    assert all("lora" in name and 4 in tensor.shape for name, tensor in saved.items())


def test_trainable_tokens_store_only_their_embedding_rows(tiny_model: Path, tmp_path: Path) -> None:
    model = load(tiny_model, Lora(r=4, trainable_token_indices=[3, 7]), steps=2)
    save_adapter(model, tmp_path, "base", None)
    saved = load_file(tmp_path / WEIGHTS)
    tokens = [tensor for name, tensor in saved.items() if "lora" not in name]
    assert [tuple(tensor.shape) for tensor in tokens] == [(2, 64)]
    reloaded = load_adapter(load_base(tiny_model, Quantization(), torch.float32, CPU), tmp_path)
    base_embedding = load_base(tiny_model, Quantization(), torch.float32, CPU).get_input_embeddings().weight
    with torch.no_grad():
        embedded = reloaded.get_input_embeddings()(torch.tensor([3, 7, 8]))
    assert torch.equal(embedded[:2], tokens[0])
    assert not torch.equal(embedded[0], base_embedding[3])
    assert torch.equal(embedded[2], base_embedding[8])


@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_olora_starts_from_the_qr_decomposition_and_keeps_the_outputs_of_the_base(kind: str, tiny_model: Path) -> None:
    expected = logits(load(tiny_model, Lora(r=4), kind))
    model = load(tiny_model, Lora(r=4, lora_alpha=6, init_lora_weights="olora"), kind)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    q, r = torch.linalg.qr(dequantized_weight(layer.get_base_layer()))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.equal(a, torch.cat([r[:4], -r[:4]]))
    assert torch.equal(b, torch.cat([q[:, :4], q[:, :4]], 1))
    assert layer.scaling["default"] == 1.5
    assert torch.allclose(logits(model), expected, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit", "Lion8bit"])
def test_constant_half_of_olora_stays_constant_with_every_optimizer(optimizer: str, tiny_model: Path) -> None:
    import bitsandbytes as bnb

    model = load(tiny_model, OLORA)
    optim: Any = getattr(bnb.optim, optimizer)(trainable_parameters(model), lr=0.01, weight_decay=0.0)
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    start = [(layer.lora_A["default"].weight.clone(), layer.lora_B["default"].weight.clone()) for layer in layers]
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optim.step()
        optim.zero_grad()
    for layer, (a, b) in zip(layers, start, strict=True):
        new_a, new_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert torch.equal(new_a[4:], a[4:])
        assert torch.equal(new_b[:, 4:], b[:, 4:])
        assert not torch.equal(new_a[:4], a[:4])
        assert not torch.equal(new_b[:, :4], b[:, :4])


def test_olora_rank_above_the_weights_rank_is_refused(tiny_model: Path) -> None:
    with pytest.raises(InvalidSpec, match=r"k_proj.*\(32, 64\)"):
        load(tiny_model, Lora(r=33, init_lora_weights="olora"))


def test_regularization_is_what_peft_adds_to_the_loss(tiny_model: Path) -> None:
    model = load(tiny_model, ADALORA, steps=2, total_steps=10)
    with torch.no_grad():
        with_penalty, penalty = model(IDS, labels=IDS).loss, orthogonality_loss(model)
        without = model.get_base_model()(IDS, labels=IDS).loss
    assert penalty is not None
    assert penalty > 0
    assert with_penalty.item() == pytest.approx((without + penalty).item(), rel=1e-6)
    assert orthogonality_loss(load(tiny_model)) is None


@pytest.mark.parametrize("total_steps", [2, 3, 10])
def test_adalora_ends_at_its_mean_rank(total_steps: int, tiny_model: Path) -> None:
    model = load(tiny_model, ADALORA, steps=total_steps, total_steps=total_steps)
    layers = [module for module in model.modules() if isinstance(module, AdaLoraLayer)]
    ranks = [int((layer.lora_E["default"] != 0).sum()) for layer in layers]
    assert sum(ranks) == 2 * len(layers)
    assert len(set(ranks)) > 1


@pytest.mark.parametrize(("total_steps", "skipped"), [(4, {1}), (4, {2}), (4, {1, 2}), (10, {3}), (10, {5, 6})])
def test_adalora_ends_at_its_mean_rank_despite_skipped_steps(
    total_steps: int, skipped: set[int], tiny_model: Path
) -> None:
    model = load(tiny_model, ADALORA, total_steps=total_steps)
    train(model, range(1, total_steps + 1), skipped)
    layers = [module for module in model.modules() if isinstance(module, AdaLoraLayer)]
    assert all(weight.isfinite().all() for weight in trainable_parameters(model))
    assert sum(int((layer.lora_E["default"] != 0).sum()) for layer in layers) == 2 * len(layers)


def test_adaloras_scale_is_not_trained(tiny_model: Path) -> None:
    # PEFT trains it on a bfloat16 base, and does not save it.
    model = load(tiny_model, ADALORA, dtype=torch.bfloat16)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "ranknum" in name)


@pytest.mark.parametrize("saved_at", [3, 7], ids=["while pruning", "after pruning"])
def test_adalora_resumes_from_a_checkpoint_bit_for_bit(saved_at: int, tiny_model: Path) -> None:
    model = load(tiny_model, ADALORA, steps=saved_at, total_steps=10)
    weights, allocation = [weight.detach().clone() for weight in trainable_parameters(model)], allocation_state(model)

    train(model, range(saved_at + 1, saved_at + 3))
    expected = [weight.detach().clone() for weight in trainable_parameters(model)]
    resumed = load(tiny_model, ADALORA, total_steps=10)
    with torch.no_grad():
        for weight, saved in zip(trainable_parameters(resumed), weights, strict=True):
            weight.copy_(saved)
    restore_allocation(resumed, allocation)
    train(resumed, range(saved_at + 1, saved_at + 3))
    assert all(torch.equal(one, other) for one, other in zip(expected, trainable_parameters(resumed), strict=True))


def test_other_methods_have_no_allocation_state(tiny_model: Path) -> None:
    model = load(tiny_model)
    assert allocation_state(model) == {}
    restore_allocation(model, {})
    prune_after_step(model, 1)


@pytest.mark.parametrize("adapter", METHODS, ids=lambda adapter: adapter.method)
def test_saved_files_are_reproducible_and_plain_peft_loads_them(
    adapter: Adapter, tiny_model: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        model = load(tiny_model, adapter, steps=3, total_steps=3)
        save_adapter(model, tmp_path / name, "org/model", "abc123")
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    base = load_base(tiny_model, Quantization(), torch.float32, CPU)
    assert torch.equal(logits(PeftModel.from_pretrained(base, str(tmp_path / "one"))), logits(model))


def test_saved_config_names_the_base_and_no_local_path(tiny_model: Path, tmp_path: Path) -> None:
    save_adapter(load(tiny_model), tmp_path, "org/model", "abc123")
    text = (tmp_path / CONFIG).read_text()
    config = json.loads(text)
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/model", "abc123")
    assert str(tiny_model) not in text
    assert config["inference_mode"] is True
    assert config["task_type"] == "CAUSAL_LM"
    assert len(config["target_modules"]) > 6
    assert config["target_modules"] == sorted(config["target_modules"])


def test_adalora_training_continues_after_saving(tiny_model: Path, tmp_path: Path) -> None:
    model = load(tiny_model, ADALORA, steps=6, total_steps=10)
    before = model.active_peft_config.rank_pattern
    save_adapter(model, tmp_path, "base", None)
    assert before is not None
    assert model.active_peft_config.rank_pattern == before
    train(model, range(7, 9))


def test_vera_stores_the_projections_that_its_key_gives(tiny_model: Path, tmp_path: Path) -> None:
    stored = []
    for index, key in enumerate((5, 5, 6)):
        model = load(tiny_model, Vera(method="vera", r=8, projection_prng_key=key))
        save_adapter(model, tmp_path / str(index), "base", None)
        stored.append(load_file(tmp_path / str(index) / WEIGHTS)["base_model.vera_A"])
    assert torch.equal(stored[0], stored[1])
    assert not torch.equal(stored[0], stored[2])


def test_llama_adapter_reloads_in_full_precision_on_an_unquantized_base(tiny_model: Path, tmp_path: Path) -> None:
    adapter = LlamaAdapter(method="llama_adapter", adapter_layers=2)
    model = load(tiny_model, adapter, "none", torch.bfloat16, steps=2)
    save_adapter(model, tmp_path, "base", None)
    base = load_base(tiny_model, Quantization(type="none"), torch.bfloat16, CPU)
    reloaded = dict(load_adapter(base, tmp_path).named_parameters())
    trained = {name: p for name, p in model.named_parameters() if "adaption" in name}
    assert len(trained) == 4
    assert all(torch.equal(reloaded[name], parameter) for name, parameter in trained.items())
