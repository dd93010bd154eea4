"""A simulated GPU or CPU: its choices of kernels and their workspaces, for meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from bitsandbytes.autograd._functions import MatMul8bitFp, MatMul8bitLt
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_service.planning.memory import FLOAT32_BYTES, Category
from qlora_service.planning.simulation.allocator import rounded
from qlora_service.planning.simulation.tracker import Workspace
from qlora_service.training.device import has_flash_attention, simulating_cpu

aten = torch.ops.aten

_LINEAR, _DROPOUT, _ATTENTION = F.linear, F.dropout, F.scaled_dot_product_attention


class MetaValues(TorchDispatchMode):
    """Values read from meta tensors: `boolean` for a boolean tensor, else 0. No shape depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.boolean = True
        """transformers reads whether every token is attended to, and whether no documents are packed"""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return self.boolean if args[0].dtype is torch.bool else 0
        return func(*args, **(kwargs or {}))


@contextmanager
def simulated_device(*, cuda: bool) -> Iterator[MetaValues]:
    """Inside, meta tensors run the kernels of a CUDA device (Ampere or newer), or of a CPU."""
    values = MetaValues()
    with ExitStack() as stack:
        if not cuda:
            stack.enter_context(simulating_cpu())
        # A TorchFunctionMode would be inactive in the backward pass, which recomputes layers.
        stack.enter_context(patched_attribute(F, "scaled_dot_product_attention", partial(_attention, cuda)))
        stack.enter_context(patched_attribute(F, "linear", _linear))
        if cuda:
            stack.enter_context(patched_attribute(F, "dropout", _fused_dropout))
        stack.enter_context(patched_attribute(bnb, "matmul", partial(_int8_product, cuda)))
        stack.enter_context(values)
        yield values


@contextmanager
def patched_attribute(module: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, `function` replaces the module's attribute `name`."""
    original = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, original)


def workspaces(*, cuda: bool) -> dict[str, Workspace]:
    """The temporary buffers of a device's kernels, by operator."""
    dequantized: dict[str, Workspace] = {"bitsandbytes::gemm_4bit": (Category.DEQUANTIZATION, _dequantized_bytes)}
    if not cuda:
        return dequantized
    return dequantized | {
        "torch_attn::_varlen_attn_backward": (Category.WORKSPACE, _varlen_backward_bytes),
        "aten::_scaled_dot_product_flash_attention_backward": (Category.WORKSPACE, _flash_backward_bytes),
    }


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear in the weight's precision: what autocast does for real tensors, but not for meta tensors."""
    return _LINEAR(input.to(weight.dtype), weight, bias)


def _fused_dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """A GPU's dropout, whose mask has a byte per element; elsewhere the mask has the input's dtype."""
    if not training or p in {0.0, 1.0} or inplace:
        return _DROPOUT(x, p, training, inplace)
    return torch.native_dropout(x, p, True)[0]


def _attention(  # noqa: PLR0913 - the arguments of torch's scaled_dot_product_attention
    cuda: bool,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention by the kernel that the device would choose."""
    if not cuda:
        mask = None if attn_mask is None else _additive(attn_mask, query)
        cpu = aten._scaled_dot_product_flash_attention_for_cpu
        output: torch.Tensor = cpu(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]
        return output
    if attn_mask is None and has_flash_attention(query):
        flash = aten._scaled_dot_product_flash_attention
        output = flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return output
    if query.shape[1] != key.shape[1]:
        # The memory-efficient kernel does not support query heads that share a key head: plain products remain.
        output = _ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return output
    bias = None if attn_mask is None else _padded(_additive(attn_mask, query), query, key)
    efficient = aten._scaled_dot_product_efficient_attention
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    output = efficient(query, key, value, bias, needs_gradient, dropout_p, is_causal, scale=scale)[0]
    return output


def _additive(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))


def _padded(bias: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The bias in memory with rows of a multiple of eight, as the memory-efficient kernel requires."""
    tokens = key.shape[2]
    if tokens % 8:
        bias = F.pad(bias, (0, 8 - tokens % 8))[..., :tokens]
    return bias.expand(query.shape[0], query.shape[1], query.shape[2], tokens)


def _int8_product(
    cuda: bool, x: torch.Tensor, weight: Any, out: Any = None, state: Any = None, bias: Any = None, **_: Any
) -> Any:
    """bitsandbytes' product for the device; bitsandbytes itself chooses by the input's device, here "meta"."""
    return (MatMul8bitLt if cuda else MatMul8bitFp).apply(x, weight, out, bias, state)


def _dequantized_bytes(args: Sequence[Any]) -> int:
    """bitsandbytes dequantizes the weight, and its constants, for a product with more than a few rows."""
    x, _, (rows, columns), *_ = args
    size: int = rows * columns * x.element_size() + rows * columns // 64 * FLOAT32_BYTES
    return size


def _varlen_backward_bytes(args: Sequence[Any]) -> int:
    """flash-attn 2, `mha_varlen_bwd`: float32 sums for the queries, and one key and value per query head."""
    _, q, k, _, _, _, ends, *_ = args
    tokens, heads, width = q.shape
    sums = _flash_sum_bytes(tokens + 128 * (ends.numel() - 1), heads, width)
    return sums + _expanded_bytes(q, k, k.shape[0], heads)


def _flash_backward_bytes(args: Sequence[Any]) -> int:
    """flash-attn 2, `mha_bwd`: the same for rows of equal length, (rows, heads, tokens, width)."""
    _, q, k, *_ = args
    rows, heads, tokens, width = q.shape
    expanded = 0 if k.shape[1] == heads else 2 * rows * k.shape[2] * heads * width * q.element_size()
    return _flash_sum_bytes(rows * rounded(tokens, 128), heads, width) + expanded


def _flash_sum_bytes(tokens: int, heads: int, width: int) -> int:
    return tokens * heads * (rounded(width, 32 if width <= 128 else 64) + 1) * FLOAT32_BYTES


def _expanded_bytes(q: torch.Tensor, k: torch.Tensor, tokens: int, heads: int) -> int:
    return 0 if k.shape[1] == heads else 2 * tokens * heads * q.shape[2] * q.element_size()
