"""Each hand-written backward against autograd and transformers' own modules."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from qlora_service.training.network.elementwise import (
    FrozenNorm,
    Norm,
    SwiGlu,
    rms_norm,
    rms_norm_backward,
    rms_norm_from_scale,
    rotate_,
    upcast,
)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_gradients_are_those_of_finite_differences() -> None:
    norm = Norm(double(6).detach(), 1e-3)
    assert torch.autograd.gradcheck(lambda x: FrozenNorm.apply(x, norm), double(5, 6))
    assert torch.autograd.gradcheck(SwiGlu.apply, (double(5, 6), double(5, 6)))


def test_a_row_of_tiny_values_is_normed_with_epsilon() -> None:
    x = 1e-4 * double(3, 8)
    weight, eps = double(8).detach(), 1e-6
    expected = weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    y, scale = rms_norm(x.detach(), weight, eps)
    assert (y - expected).abs().max() < 1e-14
    grad_y = torch.randn_like(y)
    (expected_grad_x,) = torch.autograd.grad(expected, x, grad_y)
    assert (rms_norm_backward(grad_y, x.detach(), weight, scale) - expected_grad_x).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_transformers_own_bit_for_bit(dtype: torch.dtype) -> None:
    module = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    module.weight.data = torch.randn(64, dtype=dtype)
    module.requires_grad_(False)
    x = torch.randn(10, 64).to(dtype)
    y, scale = rms_norm(x, module.weight, 1e-5)
    assert torch.equal(y, module(x))
    assert torch.equal(rms_norm_from_scale(x, module.weight, scale), y)


def test_the_norms_gradient_is_rounded_once() -> None:
    """In bfloat16 it equals the float32 gradient, rounded."""
    x, weight, grad_y = (torch.randn(shape).bfloat16() for shape in ((20, 64), (64,), (20, 64)))
    exact = x.double().requires_grad_()
    y = weight.double() * exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)
    (expected,) = torch.autograd.grad(y, exact, grad_y.double())
    _, scale = rms_norm(x, weight, 1e-5)
    grad_x = rms_norm_backward(grad_y, x, weight, scale)
    assert grad_x.dtype is torch.bfloat16
    assert (grad_x - expected).abs().max() < 2**-7 * expected.abs().max()


def test_a_gated_product_is_silu_times_up() -> None:
    gate, up = double(5, 6), double(5, 6)
    assert (SwiGlu.apply(gate, up) - gate / (1 + torch.exp(-gate)) * up).abs().max() < 1e-14


def test_backward_passes_leave_the_incoming_gradient_unchanged() -> None:
    gate, up, grad_y = double(5, 6), double(5, 6), torch.randn(5, 6, dtype=torch.float64)
    before = grad_y.clone()
    norm = Norm(double(6).detach(), 1e-6)
    y = SwiGlu.apply(FrozenNorm.apply(gate, norm), up)
    torch.autograd.grad(y, (gate, up), grad_y)
    assert torch.equal(grad_y, before)


def test_a_rotation_is_that_of_llama_and_its_backward_the_opposite_one() -> None:
    x = torch.randn(9, 3, 8, dtype=torch.float64)  # (tokens, heads, head_dim)
    config = LlamaConfig(hidden_size=24, num_attention_heads=3, head_dim=8)
    cos, sin = LlamaRotaryEmbedding(config).double()(x, torch.arange(9)[None])  # (1, tokens, head_dim)
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    halves = cos[0, :, None, :4], sin[0, :, None, :4]
    rotated = x.clone()
    rotate_(rotated, *halves)
    assert (rotated - expected[0].transpose(0, 1)).abs().max() < 1e-14
    assert (rotated - x).abs().max() > 0.1
    rotate_(rotated, *halves, backward=True)
    assert (rotated - x).abs().max() < 1e-6  # transformers computes cos and sin in float32


def test_rotation_scales_as_yarn_does() -> None:
    """cos and sin may be scaled beyond 1: the backward is the transposed map, not the inverse."""
    x, cos, sin = double(4, 2, 6), 1.3 * torch.randn(4, 1, 3).double(), 1.3 * torch.randn(4, 1, 3).double()
    first, second = x.chunk(2, -1)
    y = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    grad_y = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, grad_y)
    rotate_(grad_y, cos, sin, backward=True)
    assert (grad_y - expected).abs().max() < 1e-14


def test_reductions_run_in_float32_or_float64() -> None:
    assert {dtype: upcast(torch.zeros(1, dtype=dtype)).dtype for dtype in (torch.bfloat16, torch.float16)} == {
        torch.bfloat16: torch.float32,
        torch.float16: torch.float32,
    }
    assert upcast(torch.zeros(1)).dtype is torch.float32
    assert upcast(torch.zeros(1, dtype=torch.float64)).dtype is torch.float64
