"""PEFT's configuration of each adapter method, observed on the layers of a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import inject_adapter_in_model
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from transformers import GPT2Config, GPT2LMHeadModel

from qlora_service.models.adapters import allocation_state, load_adapter, save_adapter, trainable_parameters
from qlora_service.models.base.quantize import load_base
from qlora_service.models.peft_config import peft_config
from qlora_service.specs import IA3, AdaLora, Adapter, LlamaAdapter, Lora, PromptTuning, Quantization, Vera
from tests.qlora_service.models.adapter_cases import ADALORA, CPU, OLORA, load, logits

CONFIG = "adapter_config.json"


def test_alpha_and_dropout_reach_every_layer(tiny_model: Path) -> None:
    model = load(tiny_model, Lora(r=4, lora_alpha=6, lora_dropout=0.25))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 14
    assert {layer.scaling["default"] for layer in layers} == {1.5}
    assert {layer.lora_dropout["default"].p for layer in layers} == {0.25}


def test_rslora_scales_by_the_root_of_the_rank(tiny_model: Path) -> None:
    model = load(tiny_model, Lora(r=16, lora_alpha=8, use_rslora=True))
    assert {layer.scaling["default"] for layer in model.modules() if isinstance(layer, LoraLayer)} == {2.0}


def test_prompt_tuning_starts_from_tokens_of_the_base(tiny_model: Path) -> None:
    model = load(tiny_model, PromptTuning(method="prompt_tuning", num_virtual_tokens=6), dtype=torch.bfloat16)
    (prompt,) = trainable_parameters(model)
    embedding = model.get_base_model().get_input_embeddings().weight.float()
    assert prompt.dtype == torch.float32
    assert all((row == embedding).all(dim=1).any() for row in prompt)


def test_llama_adapter_skips_the_two_lowest_layers(tiny_model: Path) -> None:
    base = load_base(tiny_model, Quantization(type="none"), torch.float32, CPU)
    adapter = LlamaAdapter(method="llama_adapter")
    base.config.num_hidden_layers = 7
    assert peft_config(adapter, base).adapter_layers == 5
    base.config.num_hidden_layers = 2
    assert peft_config(adapter, base).adapter_layers == 1


def test_a_convolution_gets_a_lora() -> None:
    network = torch.nn.Sequential()
    network.add_module("conv", torch.nn.Conv2d(3, 8, kernel_size=3))
    image = torch.randn(1, 3, 6, 6)
    expected = network(image)
    adapted = inject_adapter_in_model(peft_config(Lora(r=2, target_modules=["conv"]), network), network)
    assert torch.equal(adapted(image), expected)
    assert adapted.conv.lora_A["default"].weight.shape == (2, 3, 3, 3)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(image).square().sum().backward()
    optimizer.step()
    assert not torch.equal(adapted(image), expected)


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "tiny-gpt2"
    config = GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["nf4", "none"])
@pytest.mark.parametrize(
    "adapter",
    [
        Lora(r=4),
        Lora(r=4, target_modules=["c_attn", "c_proj", "c_fc"], init_lora_weights="olora"),
        IA3(method="ia3", target_modules=["c_attn", "c_proj"], feedforward_modules=["c_proj"]),
        AdaLora(method="adalora", init_r=4, target_r=2),
        Vera(method="vera", r=8),
        LlamaAdapter(method="llama_adapter", adapter_layers=2),
    ],
    ids=lambda value: value if isinstance(value, str) else value.method,
)
def test_transposed_gpt2_layers_train_and_reload(adapter: Adapter, kind: str, tiny_gpt2: Path, tmp_path: Path) -> None:
    model = load(tiny_gpt2, adapter, kind, torch.bfloat16, steps=2, total_steps=4)
    assert not torch.equal(logits(model), logits(load(tiny_gpt2, Lora(r=4), kind, torch.bfloat16)))
    save_adapter(model, tmp_path, "base", None)
    base = load_base(tiny_gpt2, Quantization.model_validate({"type": kind}), torch.bfloat16, CPU)
    assert torch.equal(logits(load_adapter(base, tmp_path)), logits(model))


def test_olora_keeps_its_scale_with_rslora(tiny_model: Path) -> None:
    model = load(tiny_model, Lora(r=16, lora_alpha=8, use_rslora=True, init_lora_weights="olora"))
    scales = [layer.scaling["default"] for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert scales == pytest.approx([2.0] * 14)


def test_olora_is_published_as_a_plain_lora(tiny_model: Path, tmp_path: Path) -> None:
    model = load(tiny_model, OLORA, steps=2)
    save_adapter(model, tmp_path, "base", None)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 64.0, True)


def test_adalora_prunes_nothing_in_its_first_steps(tiny_model: Path) -> None:
    model = load(tiny_model, ADALORA, steps=4, total_steps=40)
    assert all((layer.lora_E["default"] != 0).all() for layer in model.modules() if isinstance(layer, AdaLoraLayer))


def test_adalora_runs_for_one_step(tiny_model: Path) -> None:
    assert len(allocation_state(load(tiny_model, ADALORA, steps=1, total_steps=1))) > 0
