"""A fused linear layer against PEFT's own forward, with bias, dropout and quantization."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from qlora_service.models.base.quantize import guard_linear4bit
from qlora_service.training.network.lora_linear import (
    FusedLinear,
    Projection,
    add_through_lora,
    fused_forward,
    lora_weights,
    project,
    project_backward,
    projection_of,
)

IN, OUT = 64, 48


def lora_layer(
    dtype: torch.dtype = torch.float64, *, bias: bool = False, quantized: bool = False, **config: Any
) -> Any:
    """A LoRA layer of PEFT with a B that is not zero, in training mode."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(IN, OUT, bias=bias, dtype=torch.float32)
    if quantized:
        dense = linear
        linear = bnb.nn.Linear4bit(IN, OUT, bias=bias, compute_dtype=dtype, quant_type="nf4")
        linear.load_state_dict(dense.state_dict())
        linear.to("cpu")
    base = torch.nn.Sequential(linear)
    if quantized:
        guard_linear4bit(base, dtype)
    else:
        base.to(dtype)
    model = get_peft_model(base, LoraConfig(**({"r": 3, "lora_alpha": 5, "target_modules": ["0"]} | config)))  # type: ignore[arg-type]
    layer: Any = model.base_model.model[0]
    for weight in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        weight.data = 0.3 * torch.randn(weight.shape, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    return layer.train()


def step(layer: Any, forward: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The output, and the gradients of the input, A and B under a fixed gradient of the output."""
    torch.manual_seed(1)  # dropout
    x = x.detach().clone().requires_grad_()
    y = forward(x)
    inputs = (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype)
    return y, *torch.autograd.grad(y, inputs, grad_y)


def assert_close(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], bound: float) -> None:
    """Same dtypes and shapes, and values within `bound` of each expected tensor's largest."""
    for tensor, reference in zip(actual, expected, strict=True):
        assert tensor.dtype is reference.dtype
        assert tensor.shape == reference.shape
        assert (tensor - reference).abs().max() <= bound * reference.abs().max()


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"lora_dropout": 0.4}, {"r": 1, "lora_alpha": 1}])
@pytest.mark.parametrize("bias", [False, True])
def test_fused_forward_equals_pefts_layer(bias: bool, config: dict[str, Any]) -> None:
    """Also with dropout: both draw the same masks."""
    layer = lora_layer(bias=bias, **config)
    x = torch.randn(2, 5, IN, dtype=torch.float64)
    fused = fused_forward(layer)
    assert fused is not None
    assert_close(step(layer, fused, x), step(layer, layer.forward, x), 1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_fused_forward_equals_pefts_layer_on_nf4(dtype: torch.dtype, bound: float) -> None:
    """A and B stay float32, and so do their gradients, whatever the compute dtype."""
    layer = lora_layer(dtype, bias=True, quantized=True)
    x = torch.randn(7, IN, dtype=dtype)
    fused = fused_forward(layer)
    assert fused is not None
    actual = step(layer, fused, x)
    assert_close(actual, step(layer, layer.forward, x), bound)
    assert [tensor.dtype for tensor in actual] == [dtype, dtype, torch.float32, torch.float32]


def test_dropout_draws_masks_only_while_training() -> None:
    layer = lora_layer(lora_dropout=0.5)
    fused = fused_forward(layer)
    assert fused is not None
    x = torch.randn(5, IN, dtype=torch.float64)
    assert not torch.equal(fused(x), fused(x))
    layer.eval()
    assert torch.equal(fused(x), fused(x))
    assert (fused(x) - layer.forward(x)).abs().max() < 1e-12


def test_with_the_adapter_off_it_is_the_frozen_layer() -> None:
    layer = lora_layer(bias=True)
    fused = fused_forward(layer)
    assert fused is not None
    x = torch.randn(5, IN, dtype=torch.float64)
    layer.enable_adapters(False)
    assert (fused(x) - layer.get_base_layer()(x)).abs().max() < 1e-12
    layer.enable_adapters(True)
    assert (fused(x) - layer.get_base_layer()(x)).abs().max() > 0.1


def side_by_side() -> list[Any]:
    """Layers that read the same input: one with LoRA and a bias, one without both, one with LoRA of another rank."""
    plain = torch.nn.Linear(IN, 10, bias=False, dtype=torch.float64).requires_grad_(False)
    return [lora_layer(bias=True), plain, lora_layer(r=5)]


def test_layers_of_the_same_input_are_projected_together() -> None:
    layers = side_by_side()
    parts = tuple(part for part in map(projection_of, layers) if part is not None)
    assert len(parts) == 3
    lora = lora_weights(parts)
    trained = [weight for weight in lora if weight is not None]
    assert len(trained) == 4
    x = torch.randn(6, IN, dtype=torch.float64, requires_grad=True)
    expected = [layer(x) for layer in layers]
    grad_outputs = [torch.randn_like(y) for y in expected]
    expected_gradients = torch.autograd.grad(expected, [x, *trained], grad_outputs)
    with torch.no_grad():
        outputs, inner = project(x, parts, lora)
        grad_through_frozen, grad_inner, grad_lora = project_backward(grad_outputs, x, inner, parts, lora)
        grad_x = add_through_lora(grad_through_frozen, grad_inner, lora)
    assert_close(tuple(outputs), tuple(expected), 1e-12)
    assert grad_x is not None
    assert_close((grad_x, *(gradient for gradient in grad_lora if gradient is not None)), expected_gradients, 1e-12)
    assert [gradient is None for gradient in grad_lora] == [False, False, True, True, False, False]


def test_a_residual_is_added_and_gets_the_gradient() -> None:
    layer = lora_layer()
    part = projection_of(layer)
    assert part is not None
    x, residual = (torch.randn(6, width, dtype=torch.float64, requires_grad=True) for width in (IN, OUT))
    y, expected = FusedLinear.apply(x, None, residual, part, part.a, part.b), layer(x) + residual
    grad_y = torch.randn_like(y)
    assert (y - expected).abs().max() < 1e-12
    inputs = (x, residual, part.a, part.b)
    assert_close(torch.autograd.grad(y, inputs, grad_y), torch.autograd.grad(expected, inputs, grad_y), 1e-12)


def test_no_gradient_is_computed_for_an_input_without_one() -> None:
    """The first layer reads frozen embeddings: its backward needs no product with its frozen weights."""
    layer = lora_layer()
    part = projection_of(layer)
    assert part is not None
    dequantized: list[torch.dtype] = []

    class Counting(Projection):
        def weight(self, dtype: torch.dtype) -> torch.Tensor:
            dequantized.append(dtype)
            return super().weight(dtype)

    counting = Counting(part.base, part.a, part.b, part.scaling)
    x = torch.randn(4, IN, dtype=torch.float64)
    FusedLinear.apply(x, None, None, counting, part.a, part.b).sum().backward()
    assert len(dequantized) == 1
    FusedLinear.apply(x.requires_grad_(), None, None, counting, part.a, part.b).sum().backward()
    assert len(dequantized) == 3


def test_only_the_input_is_saved_and_only_once() -> None:
    layer = lora_layer(torch.bfloat16, quantized=True)
    fused = fused_forward(layer)
    assert fused is not None

    def kept(forward: Any) -> int:
        storages: dict[int, int] = {}
        frozen = {p.untyped_storage().data_ptr() for p in layer.parameters()}

        def keep(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in frozen:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            output = forward(torch.randn(100, IN, dtype=torch.bfloat16, requires_grad=True))
        assert output.requires_grad
        return sum(storages.values())

    rank = 3
    assert kept(fused) == 2 * 100 * (IN + rank)
    assert kept(layer.forward) >= 2 * kept(fused)


def peft_model(module: torch.nn.Module, **config: Any) -> PeftModel:
    return get_peft_model(torch.nn.Sequential(module), LoraConfig(r=2, target_modules=["0"], **config))  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}])
def test_variants_of_lora_are_left_to_peft(config: dict[str, Any]) -> None:
    layer = lora_layer(torch.float32, bias=True, **config)
    assert projection_of(layer) is None
    assert fused_forward(layer) is None


def test_merged_layers_are_left_to_peft() -> None:
    layer = lora_layer()
    layer.merge()
    assert projection_of(layer) is None


def test_two_adapters_at_once_are_left_to_peft() -> None:
    model = peft_model(torch.nn.Linear(IN, OUT))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"]))
    assert projection_of(model.base_model.model[0]) is not None
    model.base_model.set_adapter(["default", "second"])
    assert projection_of(model.base_model.model[0]) is None


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Linear(IN, OUT),
        torch.nn.Embedding(IN, OUT).requires_grad_(False),
        bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False).requires_grad_(False),
        torch.nn.Conv1d(IN, OUT, 1).requires_grad_(False),
    ],
    ids=["trained", "embedding", "int8", "convolution"],
)
def test_other_layers_are_no_projections(layer: torch.nn.Module) -> None:
    assert projection_of(layer) is None
    assert fused_forward(layer) is None


def test_a_frozen_layer_without_an_adapter_is_a_projection_but_keeps_its_forward() -> None:
    frozen = torch.nn.Linear(IN, OUT).requires_grad_(False)
    part = projection_of(frozen)
    assert part is not None
    assert (part.a, part.b) == (None, None)
    assert fused_forward(frozen) is None
