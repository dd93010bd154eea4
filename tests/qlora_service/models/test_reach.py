"""Linear layers that a loss reaches, and "all-linear" adapters on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from qlora_service.models.adapters import attach_adapter, load_adapter, save_adapter
from qlora_service.models.reach import unloadable_layers, unreached_layers
from qlora_service.specs import Lora
from tests.families.tiny import tiny_config


def base_of(model_type: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type)).requires_grad_(False)


@pytest.mark.parametrize(
    ("model_type", "part"),
    [("gemma3", "vision_tower"), ("axk2", "indexer"), ("got_ocr2", "vision_tower"), ("zamba2", "adapter_list")],
)
def test_layers_that_a_loss_does_not_reach_are_found(model_type: str, part: str) -> None:
    unreached = unreached_layers(base_of(model_type))
    assert unreached
    assert not [name for name in unreached if part not in name and "projector" not in name]


@pytest.mark.parametrize("model_type", ["bloom", "mixtral", "jetmoe", "olmo3"])
def test_every_layer_of_a_text_decoder_is_reached(model_type: str) -> None:
    assert not unreached_layers(base_of(model_type))


@pytest.mark.parametrize("model_type", ["laguna", "inkling2_text"])
def test_layers_whose_adapter_peft_does_not_load_are_found(model_type: str, tmp_path: Path) -> None:
    base = base_of(model_type)
    unloadable = unloadable_layers(base)
    assert unloadable
    names = [*sorted(unloadable)[:1], "o_proj"]
    save_adapter(get_peft_model(base, LoraConfig(target_modules=names)), tmp_path, "base", None)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(base_of(model_type), tmp_path)
    save_adapter(attach_adapter(base_of(model_type), Lora(r=4), seed=0), tmp_path, "base", None)
    load_adapter(base_of(model_type), tmp_path)  # warnings are errors


@pytest.mark.parametrize("model_type", ["llama", "gemma3", "mixtral", "glm4_moe", "qwen3_5"])
def test_renamed_weights_that_peft_loads_are_kept(model_type: str) -> None:
    assert not unloadable_layers(base_of(model_type))


def test_the_probe_leaves_mode_values_and_random_numbers_unchanged() -> None:
    base = base_of("gemma3").eval()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    unreached_layers(base)
    assert torch.equal(torch.rand(3), expected)
    assert not base.training
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not any(module._forward_hooks for module in base.modules())


def test_all_linear_adapts_the_reached_layers_alone() -> None:
    model = attach_adapter(base_of("gemma3"), Lora(r=4), seed=0)
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert adapted
    assert all("language_model" in name for name in adapted)
