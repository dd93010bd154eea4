"""A GPU or CPU that is not there: its kernels' choices and workspaces, for tensors without values (device "meta")."""

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

from qlora_service.planning.memory import Category
from qlora_service.planning.simulation.allocator import rounded
from qlora_service.planning.simulation.tracker import Workspace
from qlora_service.training.device import has_flash_attention, standing_for_cpu

aten = torch.ops.aten

_LINEAR, _DROPOUT, _ATTENTION = F.linear, F.dropout, F.scaled_dot_product_attention

CUBLAS_WORKSPACE_BYTES = (2 * 4096 + 8 * 16) * 1024
"""Taken once from torch's allocator, up to Ada (aten/src/ATen/cuda/CublasHandlePool.cpp, 2.13)"""


class Answers(TorchDispatchMode):
    """Whoever asks for a value is told 0, and for a truth `truth`. No shape depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.truth = True
        """transformers asks whether every token is attended to, and whether no documents are packed"""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return self.truth if args[0].dtype is torch.bool else 0
        return func(*args, **(kwargs or {}))


@contextmanager
def simulated_device(*, cuda: bool) -> Iterator[Answers]:
    """Tensors without values take the ways of a CUDA device from Ampere on, or of a CPU."""
    answers = Answers()
    with ExitStack() as stack:
        if not cuda:
            stack.enter_context(standing_for_cpu())
        # A TorchFunctionMode would be off in the backward pass, where layers are computed again.
        stack.enter_context(replaced(F, "scaled_dot_product_attention", partial(_attention, cuda)))
        stack.enter_context(replaced(F, "linear", _linear))
        if cuda:
            stack.enter_context(replaced(F, "dropout", _fused_dropout))
        stack.enter_context(replaced(bnb, "matmul", partial(_int8_product, cuda)))
        stack.enter_context(answers)
        yield answers


@contextmanager
def replaced(module: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """The module's function is another."""
    original = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, original)


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """In the weight's precision, as autocast would have it; tensors without values know no autocast."""
    return _LINEAR(input.to(weight.dtype), weight, bias)


def _fused_dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """On a GPU the mask is of bytes, elsewhere of the input's type."""
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
    """By the kernel that the device would take."""
    if not cuda:
        mask = None if attn_mask is None else _additive(attn_mask, query)
        cpu = aten._scaled_dot_product_flash_attention_for_cpu
        mixed: torch.Tensor = cpu(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]
        return mixed
    if attn_mask is None and has_flash_attention(query):
        flash = aten._scaled_dot_product_flash_attention
        mixed = flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return mixed
    if query.shape[1] != key.shape[1]:
        # The memory-efficient kernel knows no heads that share a key: what is left are plain products.
        mixed = _ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return mixed
    bias = None if attn_mask is None else _padded(_additive(attn_mask, query), query, key)
    efficient = aten._scaled_dot_product_efficient_attention
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    mixed = efficient(query, key, value, bias, needs_gradient, dropout_p, is_causal, scale=scale)[0]
    return mixed


def _additive(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))


def _padded(bias: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The kernel wants rows of eight."""
    tokens = key.shape[2]
    if tokens % 8:
        bias = F.pad(bias, (0, 8 - tokens % 8))[..., :tokens]
    return bias.expand(query.shape[0], query.shape[1], query.shape[2], tokens)


def _int8_product(
    cuda: bool, x: torch.Tensor, weight: Any, out: Any = None, state: Any = None, bias: Any = None, **_: Any
) -> Any:
    """bitsandbytes chooses by the input's device, which is neither here."""
    return (MatMul8bitLt if cuda else MatMul8bitFp).apply(x, weight, out, bias, state)


def workspaces(*, cuda: bool) -> dict[str, Workspace]:
    """What a device's kernels take for themselves, by operator."""
    unpacked: dict[str, Workspace] = {"bitsandbytes::gemm_4bit": (Category.DEQUANTIZATION, _unpacked_bytes)}
    if not cuda:
        return unpacked
    return unpacked | {
        "torch_attn::_varlen_attn_backward": (Category.WORKSPACE, _varlen_backward_bytes),
        "aten::_scaled_dot_product_flash_attention_backward": (Category.WORKSPACE, _flash_backward_bytes),
    }


def _unpacked_bytes(args: Sequence[Any]) -> int:
    """bitsandbytes unpacks the weight, and its constants, for a product with more than a few rows."""
    x, _, (rows, columns), *_ = args
    size: int = rows * columns * x.element_size() + rows * columns // 64 * 4
    return size


def _varlen_backward_bytes(args: Sequence[Any]) -> int:
    """flash-attn 2, `mha_varlen_bwd`: float32 sums for the queries, and one key and value for each query head."""
    _, q, k, _, _, _, ends, *_ = args
    tokens, heads, width = q.shape
    return _flash_bytes(tokens + 128 * (ends.numel() - 1), heads, width) + _expanded_bytes(q, k, k.shape[0], heads)


def _flash_backward_bytes(args: Sequence[Any]) -> int:
    """The same for equally long rows, `mha_bwd`: (rows, heads, tokens, width)."""
    _, q, k, *_ = args
    rows, heads, tokens, width = q.shape
    expanded = 0 if k.shape[1] == heads else 2 * rows * k.shape[2] * heads * width * q.element_size()
    return _flash_bytes(rows * rounded(tokens, 128), heads, width) + expanded


def _flash_bytes(tokens: int, heads: int, width: int) -> int:
    return tokens * heads * (rounded(width, 32 if width <= 128 else 64) + 1) * 4


def _expanded_bytes(q: torch.Tensor, k: torch.Tensor, tokens: int, heads: int) -> int:
    return 0 if k.shape[1] == heads else 2 * tokens * heads * q.shape[2] * q.element_size()
