"""The cheap parts of a decoder layer (RMSNorm, SwiGLU, rotary embedding), each with a hand-written backward.

Autograd would keep every intermediate of them: three to five copies of the activations per layer.
The computation runs in float32 (float64 for float64 inputs), as in transformers, and is rounded once at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from qlora_service.training.device import runs_cpu_kernels

CPU_ELEMENTS = 1 << 18
"""Elements of a reduction that a CPU computes at a time, so that its float32 intermediates stay in the cache. Smaller
blocks cost more calls of torch: RMSNorm's forward takes 0.7 ms for 2,048 rows of 576, and 0.95 in blocks of 128 rows;
for 18,324 heads of 64 it takes 0.8 and 3.8 (bfloat16, 2 cores)."""


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMSNorm's frozen weight (width,) and epsilon."""

    weight: torch.Tensor
    eps: float


def upcast(x: torch.Tensor) -> torch.Tensor:
    """`x` in the precision of reductions: float64 stays, every other dtype becomes float32."""
    return x if x.dtype is torch.float64 else x.float()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm over the last dimension, and the reciprocal root mean square (…, 1) that its backward needs."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)  # (…, width)
    scale = upcast(x.new_empty(0)).new_empty(*x.shape[:-1], 1)  # (…, 1)
    for x_block, y_block, scale_block in _blocks(x, y, scale):
        values = upcast(x_block)
        scale_block.copy_(torch.rsqrt(values.square().mean(-1, keepdim=True) + eps))
        y_block.copy_(values * scale_block).mul_(weight)
    return y, scale


def rms_norm_from_scale(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The output of `rms_norm`, recomputed from its saved scale (…, 1)."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)  # (…, width)
    for x_block, y_block, scale_block in _blocks(x, y, scale):
        y_block.copy_(upcast(x_block) * scale_block).mul_(weight)
    return y


def rms_norm_backward(grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The gradient of x, (…, width); the weight is frozen.

    With normed = x * scale: grad_x = scale * (grad_normed - normed * mean(grad_normed * normed)).
    """
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)  # (…, width)
    for grad_y_block, x_block, scale_block, grad_x_block in _blocks(grad_y, x, scale, grad_x):
        normed = upcast(x_block) * scale_block  # (rows, width)
        grad_normed = upcast(grad_y_block * weight)  # (rows, width)
        mean_product = (grad_normed * normed).mean(-1, keepdim=True)  # (rows, 1)
        grad_x_block.copy_(grad_normed.addcmul_(normed, mean_product, value=-1).mul_(scale_block))
    return grad_x


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up"""
    return F.silu(gate).mul_(up)


def swiglu_backward(
    grad_output: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, silu: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up; overwrites `grad_output` and `silu`, which is silu(gate)."""
    grad_up = silu.mul_(grad_output)
    grad_gate: torch.Tensor = torch.ops.aten.silu_backward(grad_output.mul_(up), gate)
    return grad_gate, grad_up


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool = False) -> None:
    """Rotary position embedding in place on (tokens, heads, head_dim), the halves paired as in Llama.

    cos and sin are (tokens, 1, head_dim / 2). The backward of a rotation is the opposite rotation.
    """
    first, second = x.chunk(2, -1)  # (tokens, heads, head_dim / 2), views of x
    sign = 1 if backward else -1
    first_sin = first * sin  # (tokens, heads, head_dim / 2)
    first.mul_(cos).addcmul_(second, sin, value=sign)
    second.mul_(cos).add_(first_sin, alpha=-sign)


class FrozenNorm(torch.autograd.Function):
    """RMSNorm with a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        y, scale = rms_norm(x, norm.weight, norm.eps)  # (…, width), (…, 1)
        ctx.norm = norm
        ctx.save_for_backward(x, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, scale = ctx.saved_tensors
        return rms_norm_backward(grad_y, x, ctx.norm.weight, scale), None


class SwiGlu(torch.autograd.Function):
    """silu(gate) * up"""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return swiglu_backward(grad_output.clone(), gate, up, F.silu(gate))


def _blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The tensors as (rows, …) blocks of at most `CPU_ELEMENTS` elements of the first one on a CPU; else whole."""
    if not runs_cpu_kernels(tensors[0]):
        yield tensors
        return
    rows = max(1, CPU_ELEMENTS // tensors[0].shape[-1])
    yield from zip(*(tensor.reshape(-1, tensor.shape[-1]).split(rows) for tensor in tensors), strict=True)
