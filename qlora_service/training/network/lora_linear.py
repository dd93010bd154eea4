"""A frozen linear layer with its LoRA as one autograd function that saves its input once.

PEFT's own forward keeps the input in the compute dtype and again in float32, clones the base layer's output, and
computes the LoRA product in float32. Here A and B are cast to the compute dtype (their master copies and gradients stay
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
    """A frozen (out, in) linear layer and, if it has one, its LoRA."""

    base: torch.nn.Linear
    a: torch.nn.Parameter | None = None
    """(r, in)"""
    b: torch.nn.Parameter | None = None
    """(out, r)"""
    scaling: float = 1.0

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """(out, in) in the compute dtype, dequantized at each call: it is needed for one product only."""
        weight: Any = self.base.weight
        if isinstance(self.base, bnb.nn.Linear4bit):
            return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).to(dtype)
        return weight.to(dtype)


def projection_of(module: Any) -> Projection | None:
    """The layer as a `Projection`; None unless it is a frozen linear layer without LoRA or with plain LoRA."""
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
    is_shared = not isinstance(a.weight, torch.nn.Parameter)  # the LoRA of a head that uses its embedding's LoRA
    if is_shared or a.bias is not None or b.bias is not None or getattr(module, "fan_in_fan_out", False):
        return None
    return Projection(base.base, a.weight, b.weight, module.scaling[names[0]])


def fused_forward(module: Any) -> Callable[..., torch.Tensor] | None:
    """The forward of a plain LoRA layer as one autograd function; None for any other module.

    While the adapter is switched off, it computes the frozen part only.
    """
    part = projection_of(module) if type(module) in {LoraLinear, LoraLinear4bit} else None
    if part is None or part.a is None:
        return None
    (name,) = module.active_adapters
    dropout = module.lora_dropout[name]
    frozen = Projection(part.base)

    def forward(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        if module.disable_adapters:
            y = FusedLinear.apply(flat, None, None, frozen, None, None)  # (tokens, out)
        else:
            dropped = dropout(flat) if isinstance(dropout, torch.nn.Dropout) and module.training else None
            y = FusedLinear.apply(flat, dropped, None, part, part.a, part.b)  # (tokens, out)
        return y.view(*x.shape[:-1], -1)

    return forward


def lora_weights(parts: Sequence[Projection]) -> list[torch.nn.Parameter | None]:
    """A and B of each part in turn: the inputs of an autograd function, so that they get gradients."""
    return [weight for part in parts for weight in (part.a, part.b)]


def project(
    x: torch.Tensor,
    parts: Sequence[Projection],
    lora: Sequence[torch.Tensor | None],
    dropped: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """The output (tokens, out) of each part, and x Aᵀ (tokens, sum of r) for the backward.

    x is (tokens, in); `dropped` is x after dropout, the input of A only; `lora` holds `lora_weights` of the parts.
    """
    outputs = [F.linear(x, part.weight(x.dtype), _bias(part, x.dtype)) for part in parts]
    if all(a is None for a in lora[::2]):
        return outputs, None
    inner = (x if dropped is None else dropped) @ _stacked_a(lora, x.dtype).t()  # (tokens, sum of r)
    for index, columns in _lora_columns(lora):
        b = lora[2 * index + 1]  # (out, r)
        assert b is not None
        outputs[index].addmm_(inner[:, columns], b.to(x.dtype).t(), alpha=parts[index].scaling)
    return outputs, inner


def project_backward(
    grad_outputs: Sequence[torch.Tensor],
    x: torch.Tensor,
    inner: torch.Tensor | None,
    parts: Sequence[Projection],
    lora: Sequence[torch.Tensor | None],
    needs_grad_x: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[torch.Tensor | None]]:
    """Gradients of x through the frozen weights, of `inner` (x Aᵀ), and of each A and B.

    `x` is the input of A, after dropout. The gradient of A's input is grad_inner times A: the caller adds it to grad_x,
    or passes it through the dropout.
    """
    grad_x: torch.Tensor | None = None  # (tokens, in)
    if needs_grad_x:
        for grad_output, part in zip(grad_outputs, parts, strict=True):
            weight = part.weight(grad_output.dtype)  # (out, in)
            grad_x = grad_output @ weight if grad_x is None else grad_x.addmm_(grad_output, weight)
            del weight  # otherwise two dequantized weights exist at once
    grad_lora: list[torch.Tensor | None] = [None] * len(lora)
    if inner is None:
        return grad_x, None, grad_lora
    grad_inner = torch.empty_like(inner)  # (tokens, sum of r)
    for index, columns in _lora_columns(lora):
        grad_output, b, scaling = grad_outputs[index], lora[2 * index + 1], parts[index].scaling
        assert b is not None
        grad_inner[:, columns] = (grad_output @ b.to(grad_output.dtype)).mul_(scaling)
        # (r, out): as (out, r) the product takes 0.7 ms, not 0.4, on a CPU (1,536 wide)
        grad_b = inner[:, columns].t() @ grad_output
        grad_lora[2 * index + 1] = grad_b.t().to(b.dtype, memory_format=torch.contiguous_format).mul_(scaling)
    grad_stacked_a = grad_inner.t() @ x  # (sum of r, in)
    for index, columns in _lora_columns(lora):
        a = lora[2 * index]  # (r, in)
        assert a is not None
        grad_lora[2 * index] = grad_stacked_a[columns].to(a.dtype)
    return grad_x, grad_inner, grad_lora


def add_through_lora(
    grad_x: torch.Tensor | None, grad_inner: torch.Tensor | None, lora: Sequence[torch.Tensor | None]
) -> torch.Tensor | None:
    """The whole gradient of x: the part through the frozen weights plus, in place, the part through A."""
    if grad_x is None or grad_inner is None:
        return grad_x
    return grad_x.addmm_(grad_inner, _stacked_a(lora, grad_x.dtype))


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
        (y,), inner = project(x, (part,), lora, dropped)  # (tokens, out), (tokens, r)
        ctx.part, ctx.has_dropout = part, dropped is not None
        ctx.save_for_backward(x if dropped is None else dropped, inner, *lora)
        return y if residual is None else y.add_(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[Any, ...]:
        x, inner, *lora = ctx.saved_tensors  # x after dropout
        grad_x, grad_inner, grad_lora = project_backward(
            (grad_y,), x, inner, (ctx.part,), lora, ctx.needs_input_grad[0]
        )  # (tokens, in), (tokens, r), [(r, in), (out, r)]
        grad_residual = grad_y if ctx.needs_input_grad[2] else None  # (tokens, out)
        if ctx.has_dropout:
            assert grad_inner is not None
            return grad_x, grad_inner @ _stacked_a(lora, grad_y.dtype), grad_residual, None, *grad_lora
        return add_through_lora(grad_x, grad_inner, lora), None, grad_residual, None, *grad_lora


def _lora_columns(lora: Sequence[torch.Tensor | None]) -> list[tuple[int, slice]]:
    """For each part with LoRA: its index and its columns of x Aᵀ."""
    columns = []
    start = 0
    for index, a in enumerate(lora[::2]):
        if a is not None:
            columns.append((index, slice(start, start + a.shape[0])))
            start += a.shape[0]
    return columns


def _stacked_a(lora: Sequence[torch.Tensor | None], dtype: torch.dtype) -> torch.Tensor:
    """The A of all parts, stacked along r: (sum of r, in)."""
    stack = [a for a in lora[::2] if a is not None]
    return (stack[0] if len(stack) == 1 else torch.cat(stack)).to(dtype)


def _bias(part: Projection, dtype: torch.dtype) -> torch.Tensor | None:
    bias: torch.Tensor | None = part.base.bias  # (out,)
    return None if bias is None else bias.to(dtype)
