"""Each hand-made backward against autograd and against transformers' own modules."""

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
    rms_norm_again,
    rms_norm_backward,
    rotate_,
    wide,
)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_gradients_are_those_of_finite_differences() -> None:
    norm = Norm(double(6).detach(), 1e-3)
    assert torch.autograd.gradcheck(lambda x: FrozenNorm.apply(x, norm), double(5, 6))
    assert torch.autograd.gradcheck(SwiGlu.apply, (double(5, 6), double(5, 6)))


def test_a_tiny_row_is_normed_with_epsilon() -> None:
    x = 1e-4 * double(3, 8)
    weight, eps = double(8).detach(), 1e-6
    expected = weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    y, scale = rms_norm(x.detach(), weight, eps)
    assert (y - expected).abs().max() < 1e-14
    upstream = torch.randn_like(y)
    (by_autograd,) = torch.autograd.grad(expected, x, upstream)
    assert (rms_norm_backward(upstream, x.detach(), weight, scale) - by_autograd).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_transformers_own_bit_for_bit(dtype: torch.dtype) -> None:
    module = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    module.weight.data = torch.randn(64, dtype=dtype)
    module.requires_grad_(False)
    x = torch.randn(10, 64).to(dtype)
    y, scale = rms_norm(x, module.weight, 1e-5)
    assert torch.equal(y, module(x))
    assert torch.equal(rms_norm_again(x, module.weight, scale), y)


def test_the_norms_gradient_is_rounded_once() -> None:
    """In bfloat16 it is the float32 gradient, rounded."""
    x, weight, upstream = (torch.randn(shape).bfloat16() for shape in ((20, 64), (64,), (20, 64)))
    exact = x.double().requires_grad_()
    y = weight.double() * exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)
    (expected,) = torch.autograd.grad(y, exact, upstream.double())
    _, scale = rms_norm(x, weight, 1e-5)
    found = rms_norm_backward(upstream, x, weight, scale)
    assert found.dtype is torch.bfloat16
    assert (found - expected).abs().max() < 2**-7 * expected.abs().max()


def test_a_gated_product_is_silu_times_up() -> None:
    gate, up = double(5, 6), double(5, 6)
    assert (SwiGlu.apply(gate, up) - gate / (1 + torch.exp(-gate)) * up).abs().max() < 1e-14


def test_backward_passes_leave_what_they_were_given() -> None:
    gate, up, upstream = double(5, 6), double(5, 6), torch.randn(5, 6, dtype=torch.float64)
    before = upstream.clone()
    norm = Norm(double(6).detach(), 1e-6)
    y = SwiGlu.apply(FrozenNorm.apply(gate, norm), up)
    torch.autograd.grad(y, (gate, up), upstream)
    assert torch.equal(upstream, before)


def test_a_rotation_is_llamas_and_its_backward_the_rotation_back() -> None:
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
    assert (rotated - x).abs().max() < 1e-6  # transformers makes cos and sin in float32


def test_rotation_scales_as_yarn_does() -> None:
    """cos and sin may be longer than 1: the backward is the transposed map, not the inverse."""
    x, cos, sin = double(4, 2, 6), 1.3 * torch.randn(4, 1, 3).double(), 1.3 * torch.randn(4, 1, 3).double()
    first, second = x.chunk(2, -1)
    y = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    upstream = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, upstream)
    rotate_(upstream, cos, sin, backward=True)
    assert (upstream - expected).abs().max() < 1e-14


def test_reductions_are_wide() -> None:
    assert {dtype: wide(torch.zeros(1, dtype=dtype)).dtype for dtype in (torch.bfloat16, torch.float16)} == {
        torch.bfloat16: torch.float32,
        torch.float16: torch.float32,
    }
    assert wide(torch.zeros(1)).dtype is torch.float32
    assert wide(torch.zeros(1, dtype=torch.float64)).dtype is torch.float64
