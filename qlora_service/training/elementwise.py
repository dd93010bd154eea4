"""The cheap parts of a decoder layer, each as a forward and its backward by hand.

By hand, because autograd would keep every intermediate of them: three to five copies of the activations per layer.
Maths is done in float32 (float64 for float64 inputs), as transformers does, and rounded once at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


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
    scale = torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)
    return rms_norm_again(x, weight, scale), scale


def rms_norm_again(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The same output from the saved scale."""
    return (wide(x) * scale).to(x.dtype).mul_(weight)


def rms_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """The gradient of the input; the weight is frozen."""
    normed = wide(x) * scale
    weighted = wide(gradient * weight)
    along = (weighted * normed).mean(-1, keepdim=True)
    return weighted.addcmul_(normed, along, value=-1).mul_(scale).to(x.dtype)


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
