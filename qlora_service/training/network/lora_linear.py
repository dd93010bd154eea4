"""One linear layer over a frozen weight with its LoRA, as one function that saves its input once.

PEFT's own forward keeps the input in the compute dtype and again in float32, clones the base's output, and computes
the LoRA product in float32. Here A and B are cast to the compute dtype (their master copies and gradients stay
float32), and layers that read the same input, such as q, k and v, share the product with their A.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import Linear4bit as LoraLinear4bit
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class Projection:
    """A frozen (out, in) layer and, if it has one, its LoRA."""

    base: torch.nn.Linear
    a: torch.nn.Parameter | None = None
    """(r, in)"""
    b: torch.nn.Parameter | None = None
    """(out, r)"""
    scaling: float = 1.0

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """(out, in) in the compute dtype, dequantized anew: it lives as long as one product."""
        weight: Any = self.base.weight
        if isinstance(self.base, bnb.nn.Linear4bit):
            return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).to(dtype)
        return weight.to(dtype)


def projection_of(module: Any) -> Projection | None:
    """The layer as a `Projection`; None where it is anything but a frozen linear layer with or without plain LoRA."""
    kind = type(module)
    if kind in {torch.nn.Linear, bnb.nn.Linear4bit}:
        return Projection(module) if not any(p.requires_grad for p in module.parameters()) else None
    if kind not in {LoraLinear, LoraLinear4bit} or module.merged:
        return None
    base = projection_of(module.get_base_layer())
    if module.disable_adapters:
        return base
    names = module.active_adapters
    if base is None or len(names) != 1 or names[0] not in module.lora_A or module.lora_variant:
        return None
    a, b = module.lora_A[names[0]], module.lora_B[names[0]]
    is_shared = not isinstance(a.weight, torch.nn.Parameter)  # a head's, which uses its embedding's
    if is_shared or a.bias is not None or b.bias is not None or getattr(module, "fan_in_fan_out", False):
        return None
    return Projection(base.base, a.weight, b.weight, module.scaling[names[0]])


def lora_weights(parts: Sequence[Projection]) -> list[torch.nn.Parameter | None]:
    """A and B of each part in turn: what an autograd function takes as inputs, so that they get gradients."""
    return [weight for part in parts for weight in (part.a, part.b)]


def project(
    x: torch.Tensor,
    parts: Sequence[Projection],
    lora: Sequence[torch.Tensor | None],
    dropped: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """The output (tokens, out) of each part, and x Aᵀ (tokens, sum of r) for the backward.

    x is (tokens, in); `dropped` is x after dropout, which only A sees.
    """
    outputs = [F.linear(x, part.weight(x.dtype), _bias(part, x.dtype)) for part in parts]
    if all(a is None for a in lora[::2]):
        return outputs, None
    inner = (x if dropped is None else dropped) @ _downs(lora, x.dtype).t()
    for index, inside in _spans(lora):
        up = lora[2 * index + 1]
        assert up is not None
        outputs[index].addmm_(inner[:, inside], up.to(x.dtype).t(), alpha=parts[index].scaling)
    return outputs, inner


def project_backward(
    gradients: Sequence[torch.Tensor],
    x: torch.Tensor,
    inner: torch.Tensor | None,
    parts: Sequence[Projection],
    lora: Sequence[torch.Tensor | None],
    needs_input: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[torch.Tensor | None]]:
    """Gradients: of x through the frozen weights, of x Aᵀ, and of each A and B. `x` is what A saw.

    The gradient of A's input is the second times A: the caller adds it to the first, or gives it to the dropout.
    """
    of_x: torch.Tensor | None = None
    if needs_input:
        for gradient, part in zip(gradients, parts, strict=True):
            weight = part.weight(gradient.dtype)
            of_x = gradient @ weight if of_x is None else of_x.addmm_(gradient, weight)
            del weight  # else the next one is unpacked beside it
    of_lora: list[torch.Tensor | None] = [None] * len(lora)
    if inner is None:
        return of_x, None, of_lora
    of_inner = torch.empty_like(inner)
    for index, inside in _spans(lora):
        gradient, up, scaling = gradients[index], lora[2 * index + 1], parts[index].scaling
        assert up is not None
        of_inner[:, inside] = (gradient @ up.to(gradient.dtype)).mul_(scaling)
        of_up = inner[:, inside].t() @ gradient  # (r, out): as (out, r) it takes 0.7 ms, not 0.4, on a CPU (1,536 wide)
        of_lora[2 * index + 1] = of_up.t().to(up.dtype, memory_format=torch.contiguous_format).mul_(scaling)
    of_downs = of_inner.t() @ x  # (sum of r, in)
    for index, inside in _spans(lora):
        down = lora[2 * index]
        assert down is not None
        of_lora[2 * index] = of_downs[inside].to(down.dtype)
    return of_x, of_inner, of_lora


def add_through_lora(
    of_x: torch.Tensor | None, of_inner: torch.Tensor | None, lora: Sequence[torch.Tensor | None]
) -> torch.Tensor | None:
    """The whole gradient of x: what came through the frozen weights and, in place, what came through A."""
    if of_x is None or of_inner is None:
        return of_x
    return of_x.addmm_(of_inner, _downs(lora, of_x.dtype))


def _spans(lora: Sequence[torch.Tensor | None]) -> list[tuple[int, slice]]:
    """For each part with LoRA: its index and its columns of x Aᵀ."""
    spans = []
    start = 0
    for index, down in enumerate(lora[::2]):
        if down is not None:
            spans.append((index, slice(start, start + down.shape[0])))
            start += down.shape[0]
    return spans


def _bias(part: Projection, dtype: torch.dtype) -> torch.Tensor | None:
    bias: torch.Tensor | None = part.base.bias
    return None if bias is None else bias.to(dtype)


def _downs(lora: Sequence[torch.Tensor | None], dtype: torch.dtype) -> torch.Tensor:
    """The A of all parts, one below the other, (sum of r, in)."""
    downs = [a for a in lora[::2] if a is not None]
    return (downs[0] if len(downs) == 1 else torch.cat(downs)).to(dtype)


class FusedLinear(torch.autograd.Function):
    """y = W x + bias + scaling B A dropout(x), plus a residual; (tokens, in) to (tokens, out)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        residual: torch.Tensor | None,
        part: Projection,
        *lora: torch.Tensor | None,
    ) -> torch.Tensor:
        (y,), inner = project(x, (part,), lora, dropped)
        ctx.part, ctx.has_dropout = part, dropped is not None
        ctx.save_for_backward(x if dropped is None else dropped, inner, *lora)
        return y if residual is None else y.add_(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        x, inner, *lora = ctx.saved_tensors
        of_x, of_inner, of_lora = project_backward((gradient,), x, inner, (ctx.part,), lora, ctx.needs_input_grad[0])
        of_residual = gradient if ctx.needs_input_grad[2] else None
        if ctx.has_dropout:
            assert of_inner is not None
            return of_x, of_inner @ _downs(lora, gradient.dtype), of_residual, None, *of_lora
        return add_through_lora(of_x, of_inner, lora), None, of_residual, None, *of_lora


def fused_forward(module: Any) -> Callable[..., torch.Tensor] | None:
    """The forward of a plain LoRA layer as one function; None for any other module.

    With the adapter switched off, it computes the frozen part only.
    """
    part = projection_of(module) if type(module) in {LoraLinear, LoraLinear4bit} else None
    if part is None or part.a is None:
        return None
    (name,) = module.active_adapters
    dropout = module.lora_dropout[name]
    frozen = Projection(part.base)

    def forward(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if module.disable_adapters:
            y = FusedLinear.apply(flat, None, None, frozen, None, None)
        else:
            dropped = dropout(flat) if isinstance(dropout, torch.nn.Dropout) and module.training else None
            y = FusedLinear.apply(flat, dropped, None, part, part.a, part.b)
        return y.view(*x.shape[:-1], -1)

    return forward
