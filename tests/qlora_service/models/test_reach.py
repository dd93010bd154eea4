"""Linear layers that a loss reaches, and "all-linear" adapters on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_service.models.adapters import attach_adapter
from qlora_service.models.reach import unreached_layers
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
