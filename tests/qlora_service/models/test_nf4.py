from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch

from qlora_service.errors import InvalidModel
from qlora_service.models.nf4 import base_fingerprint, guard_linear4bit, load_base
from qlora_service.specs import Quantization
from tests.tiny_training import CPU


def linear4bit(model: torch.nn.Module) -> list[bnb.nn.Linear4bit]:
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


@pytest.mark.parametrize("double_quant", [True, False])
def test_every_linear_layer_is_nf4_and_guarded(tiny_model: Path, double_quant: bool) -> None:
    base = load_base(tiny_model, Quantization(double_quant=double_quant), torch.bfloat16, CPU)
    layers = linear4bit(base)
    assert len(layers) == 14
    for layer in layers:
        state = layer.weight.quant_state
        assert (state.quant_type, state.blocksize, state.nested) == ("nf4", 64, double_quant)
        assert state.dtype == torch.bfloat16
        assert layer.support_avx512bf16_for_cpu is False
        assert layer.compute_dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_the_guard_makes_forward_and_backward_use_one_precision(tiny_model: Path) -> None:
    base = load_base(tiny_model, Quantization(), torch.float32, CPU)
    layer = linear4bit(base)[0]
    x = torch.randn(3, layer.in_features, requires_grad=True)
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, weight.sum(0).expand_as(x), atol=1e-6)


def test_fingerprint_is_the_same_for_the_same_weights_and_differs_for_others(tiny_model: Path) -> None:
    first = load_base(tiny_model, Quantization(), torch.bfloat16, CPU)
    second = load_base(tiny_model, Quantization(), torch.bfloat16, CPU)
    assert base_fingerprint(first) == base_fingerprint(second)
    second.get_input_embeddings().weight.data[5, 0] += 1.0
    assert base_fingerprint(first) != base_fingerprint(second)


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="cannot be loaded"):
        load_base(tmp_path, Quantization(), torch.float32, CPU)


def test_the_guard_sets_the_backwards_precision(tiny_model: Path) -> None:
    base = load_base(tiny_model, Quantization(), torch.float32, CPU)
    layer = base.model.layers[0].mlp.up_proj
    layer.weight.quant_state.dtype = torch.float16
    layer.support_avx512bf16_for_cpu = True
    guard_linear4bit(base, torch.float32)
    assert (layer.weight.quant_state.dtype, layer.support_avx512bf16_for_cpu) == (torch.float32, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_quantized_has_the_compute_dtype(tiny_model: Path, dtype: torch.dtype) -> None:
    base = load_base(tiny_model, Quantization(), dtype, CPU)
    assert base.get_input_embeddings().weight.dtype == base.model.norm.weight.dtype == dtype


def test_the_fingerprint_sees_attention_and_keeps_the_mode(tiny_model: Path) -> None:
    base = load_base(tiny_model, Quantization(type="none"), torch.float32, CPU).train()
    before = base_fingerprint(base)
    base.model.layers[0].self_attn.q_proj.weight.data += 0.1  # one token alone would not show it
    assert base_fingerprint(base) != before
    assert base.training
