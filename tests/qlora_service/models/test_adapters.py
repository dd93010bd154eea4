from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qlora_service.errors import InvalidSpec
from qlora_service.models.adapters import attach, load_adapter, save_adapter, silence_dropout, trainable
from qlora_service.models.nf4 import base_fingerprint, load_base
from qlora_service.specs import Adapter, Quantization
from qlora_service.training.micro_batch import collate, forward
from tests.tiny_training import CPU, load, rows


def test_the_first_outputs_are_the_bases_bit_for_bit(tiny_model: Path) -> None:
    base = load_base(tiny_model, Quantization(), torch.bfloat16, CPU)
    before = base_fingerprint(base)
    assert base_fingerprint(attach(base, Adapter(), seed=0)) == before


def test_only_the_adapter_is_trainable_and_it_is_float32(tiny_model: Path) -> None:
    model = load(tiny_model, dtype=torch.bfloat16, adapter=Adapter(r=4, target_modules=["q_proj", "v_proj"]))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 2 * 2
    assert all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in names)
    assert {parameter.dtype for parameter in trainable(model)} == {torch.float32}


def test_the_seed_decides_a(tiny_model: Path) -> None:
    first, same, other = (
        attach(load_base(tiny_model, Quantization(), torch.float32, CPU), Adapter(), seed) for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(trainable(first), trainable(same), strict=True))
    assert not torch.equal(trainable(first)[0], trainable(other)[0])


def test_a_target_that_does_not_exist_is_refused(tiny_model: Path) -> None:
    with pytest.raises(InvalidSpec, match="nowhere_proj"):
        load(tiny_model, adapter=Adapter(target_modules=["nowhere_proj"]))


def test_the_bases_own_dropout_is_off(tiny_model: Path) -> None:
    base = load_base(tiny_model, Quantization(), torch.float32, CPU)
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model = attach(base, Adapter(), seed=0).train()
    batch = collate(rows(2), CPU)
    assert torch.equal(forward(model, batch), forward(model, batch))


def test_saved_files_name_the_base_and_load_to_the_same_outputs(tiny_model: Path, tmp_path: Path) -> None:
    model = load(tiny_model, perturb_b=0.05).eval()
    expected = forward(model, collate(rows(3), CPU))
    save_adapter(model, tmp_path, "org/model", "abc123")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/model", "abc123")
    assert str(tiny_model) not in (tmp_path / "adapter_config.json").read_text()
    reloaded = load_adapter(model.unload(), tmp_path).eval()
    assert torch.equal(forward(reloaded, collate(rows(3), CPU)), expected)


def test_saving_twice_gives_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_adapter(load(tiny_model, perturb_b=0.05), tmp_path / name, "base", None)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_alpha_and_dropout_reach_every_layer(tiny_model: Path) -> None:
    model = load(tiny_model, adapter=Adapter(r=4, lora_alpha=6, lora_dropout=0.25))
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert len(layers) == 14
    assert {layer.scaling["default"] for layer in layers} == {1.5}
    assert {layer.lora_dropout["default"].p for layer in layers} == {0.25}


def test_the_bases_dropout_layers_are_off() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4)).train()
    silence_dropout(base)
    batch = collate(rows(2), CPU)
    assert torch.equal(forward(base, batch), forward(base, batch))


def test_the_saved_config_is_in_order_and_for_inference(tiny_model: Path, tmp_path: Path) -> None:
    import json

    save_adapter(load(tiny_model), tmp_path, "base", None)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["inference_mode"] is True
    assert len(config["target_modules"]) > 6
    assert config["target_modules"] == sorted(config["target_modules"])
