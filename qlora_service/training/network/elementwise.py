"""The cheap parts of a decoder layer, each as a forward and its backward by hand.

By hand, because autograd would keep every intermediate of them: three to five copies of the activations per layer.
Maths is done in float32 (float64 for float64 inputs), as transformers does, and rounded once at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from qlora_service.training.device import computes_as_cpu

CPU_ELEMENTS = 1 << 18
"""Elements of a reduction that are computed at a time on a CPU: its float32 intermediates are to stay in the cache, and
each block costs its calls of torch. RMSNorm's forward takes 0.7 ms for 2,048 rows of 576, and 0.95 in blocks of 128
rows; for 18,324 heads of 64 it takes 0.8 and 3.8 (bfloat16, 2 cores)."""


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMSNorm's frozen weight (width,) and epsilon."""

    weight: torch.Tensor
    eps: float


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in the precision of reductions: float64 stays, everything else is float32."""
    return x if x.dtype is torch.float64 else x.float()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm over the last dimension, and the reciprocal root mean square (…, 1) that its backward needs."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    scale = wide(x.new_empty(0)).new_empty(*x.shape[:-1], 1)
    for of_x, of_y, of_scale in _blocks(x, y, scale):
        values = wide(of_x)
        of_scale.copy_(torch.rsqrt(values.square().mean(-1, keepdim=True) + eps))
        of_y.copy_(values * of_scale).mul_(weight)
    return y, scale


def rms_norm_again(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The same output from the saved scale."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for of_x, of_y, of_scale in _blocks(x, y, scale):
        of_y.copy_(wide(of_x) * of_scale).mul_(weight)
    return y


def rms_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """The gradient of the input; the weight is frozen."""
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    for of_gradient, of_x, of_scale, of_result in _blocks(gradient, x, scale, result):
        normed = wide(of_x) * of_scale
        weighted = wide(of_gradient * weight)
        along = (weighted * normed).mean(-1, keepdim=True)
        of_result.copy_(weighted.addcmul_(normed, along, value=-1).mul_(of_scale))
    return result


def _blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The tensors cut alike into rows of the first one's width, few enough on a CPU for its cache; else whole."""
    if not computes_as_cpu(tensors[0]):
        yield tensors
        return
    rows = max(1, CPU_ELEMENTS // tensors[0].shape[-1])
    yield from zip(*(tensor.reshape(-1, tensor.shape[-1]).split(rows) for tensor in tensors), strict=True)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up"""
    return F.silu(gate).mul_(up)


def swiglu_backward(
    gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, silu: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up; `gradient` and `silu`, which is silu(gate), are overwritten."""
    of_up = silu.mul_(gradient)
    of_gate: torch.Tensor = torch.ops.aten.silu_backward(gradient.mul_(up), gate)
    return of_gate, of_up


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool = False) -> None:
    """Rotary position embedding in place on (tokens, heads, head_dim), the halves paired as in Llama.

    cos and sin are (tokens, 1, head_dim / 2). The backward of a rotation is the rotation back.
    """
    first, second = x.chunk(2, -1)
    sign = 1 if backward else -1
    crossed = first * sin
    first.mul_(cos).addcmul_(second, sin, value=sign)
    second.mul_(cos).add_(crossed, alpha=-sign)


class FrozenNorm(torch.autograd.Function):
    """RMSNorm with a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        y, scale = rms_norm(x, norm.weight, norm.eps)
        ctx.norm = norm
        ctx.save_for_backward(x, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, scale = ctx.saved_tensors
        return rms_norm_backward(gradient, x, ctx.norm.weight, scale), None


class SwiGlu(torch.autograd.Function):
    """silu(gate) * up"""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return swiglu_backward(gradient.clone(), gate, up, F.silu(gate))
