"""Quantized layers: their settings, gradients and agreement between training and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import bitsandbytes as bnb
import pytest
import torch

from qlora_service.errors import InvalidModel
from qlora_service.models.base.quantize import base_fingerprint, dequantized_weight, guard_linear4bit, load_base
from qlora_service.specs import Quantization
from tests.families.tiny import build

CPU = torch.device("cpu")

IDS = torch.arange(5, 25)[None]
INT8 = Quantization(type="int8")


def linear4bit_layers(model: torch.nn.Module) -> list[bnb.nn.Linear4bit]:
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_weights_that_the_architecture_reads_itself_stay_unquantized(
    tmp_path: Path, kind: Literal["nf4", "int8"]
) -> None:
    base = load_base(build("longcat_flash", tmp_path / "base"), Quantization(type=kind), torch.float32, CPU)
    quantized = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    layers = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    unquantized = {name.rpartition(".")[2] for name, module in layers.items() if not isinstance(module, quantized)}
    assert unquantized == {"lm_head", "classifier"}
    assert torch.isfinite(base(input_ids=IDS).logits).all()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_linear_layer_has_4_bits_and_is_guarded(
    tiny_model: Path, kind: Literal["nf4", "fp4"], double_quant: bool
) -> None:
    base = load_base(tiny_model, Quantization(type=kind, double_quant=double_quant), torch.bfloat16, CPU)
    layers = linear4bit_layers(base)
    assert len(layers) == 14
    for layer in layers:
        state = layer.weight.quant_state
        assert (state.quant_type, state.blocksize, state.nested) == (kind, 64, double_quant)
        assert state.dtype == torch.bfloat16
        assert layer.support_avx512bf16_for_cpu is False
        assert layer.compute_dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_forward_and_backward_use_the_same_precision(tiny_model: Path) -> None:
    base = load_base(tiny_model, Quantization(), torch.float32, CPU)
    layer = linear4bit_layers(base)[0]
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


def test_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="cannot be loaded"):
        load_base(tmp_path, Quantization(), torch.float32, CPU)


def test_config_that_transformers_cannot_read_is_refused(model_directory: Path) -> None:
    config = json.loads((model_directory / "config.json").read_bytes()) | {"num_hidden_layers": "two"}
    (model_directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidModel, match=r"cannot be loaded: .*num_hidden_layers"):
        load_base(model_directory, Quantization(), torch.float32, CPU)


def test_guard_sets_the_precision_of_the_backward(tiny_model: Path) -> None:
    base = load_base(tiny_model, Quantization(), torch.float32, CPU)
    layer = base.model.layers[0].mlp.up_proj
    layer.weight.quant_state.dtype = torch.float16
    layer.support_avx512bf16_for_cpu = True
    guard_linear4bit(base, torch.float32)
    assert (layer.weight.quant_state.dtype, layer.support_avx512bf16_for_cpu) == (torch.float32, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unquantized_weights_have_the_compute_dtype(tiny_model: Path, dtype: torch.dtype) -> None:
    base = load_base(tiny_model, Quantization(), dtype, CPU)
    assert base.get_input_embeddings().weight.dtype == base.model.norm.weight.dtype == dtype


def test_fingerprint_covers_attention_and_keeps_the_training_mode(tiny_model: Path) -> None:
    base = load_base(tiny_model, Quantization(type="none"), torch.float32, CPU).train()
    before = base_fingerprint(base)
    base.model.layers[0].self_attn.q_proj.weight.data += 0.1  # a single token would not show the change
    assert base_fingerprint(base) != before
    assert base.training


@pytest.mark.parametrize("quantization", [Quantization(), Quantization(type="fp4"), INT8, Quantization(type="none")])
@pytest.mark.parametrize("after_evaluation", [False, True])
def test_gradients_use_the_same_weights_as_the_forward(
    tiny_model: Path, quantization: Quantization, after_evaluation: bool
) -> None:
    base = load_base(tiny_model, quantization, torch.float32, CPU)
    if after_evaluation:
        base_fingerprint(base)  # an evaluation, in which bitsandbytes moves scales and repacks weights
    layer = base.train().model.layers[0].mlp.down_proj
    weight = dequantized_weight(layer)
    x = torch.randn(3, layer.in_features, requires_grad=True)
    y = layer(x)
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    assert torch.allclose(y, x @ weight.T, atol=1e-5)
    assert x.grad is not None
    assert torch.allclose(x.grad, grad_y @ weight, atol=1e-5)


@pytest.mark.parametrize("quantization", [Quantization(), Quantization(type="fp4"), INT8])
def test_quantized_weights_are_close_to_the_original_weights(tiny_model: Path, quantization: Quantization) -> None:
    layers = [
        load_base(tiny_model, kind, torch.float32, CPU).model.layers[1].self_attn.k_proj
        for kind in (quantization, Quantization(type="none"))
    ]
    quantized, original = (dequantized_weight(layer) for layer in layers)
    error = ((quantized - original).norm() / original.norm()).item()
    assert 1e-4 < error < (0.02 if quantization is INT8 else 0.2)


@pytest.mark.parametrize("training", [False, True])
def test_int8_row_does_not_depend_on_its_neighbors(tiny_model: Path, training: bool) -> None:
    base = load_base(tiny_model, INT8, torch.float32, CPU).train(training)
    assert {module.state.threshold for module in base.modules() if isinstance(module, bnb.nn.Linear8bitLt)} == {0.0}
    embedded = base.get_input_embeddings()(IDS)
    outliers = embedded * 1000  # far beyond the threshold of 6 that transformers would set
    with torch.no_grad():
        alone = base(inputs_embeds=embedded).logits[0]
        together = base(inputs_embeds=torch.cat([embedded, outliers])).logits[0]
    assert torch.allclose(together, alone, atol=1e-5)


def test_int8_computes_the_same_in_training_and_in_evaluation(tiny_model: Path) -> None:
    base = load_base(tiny_model, INT8, torch.float32, CPU)
    with torch.no_grad():
        evaluated, trained = (base.train(mode)(IDS).logits for mode in (False, True))
    assert torch.equal(evaluated, trained)


def test_int8_logs_nothing_per_call(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = load_base(tiny_model, INT8, torch.bfloat16, CPU)
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            module.state.__class__ = bnb.MatmulLtState  # the product as on CUDA
    base_fingerprint(base)
    assert not caplog.records


def test_unquantized_layers_are_plain_linear_layers(tiny_model: Path) -> None:
    base = load_base(tiny_model, Quantization(type="none", double_quant=True), torch.bfloat16, CPU)
    assert type(base.model.layers[0].mlp.up_proj) is torch.nn.Linear
