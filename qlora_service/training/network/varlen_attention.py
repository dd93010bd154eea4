"""Causal attention of each document with itself alone, over several documents concatenated into one row.

The kernel depends on the device. CUDA: torch's flash attention over variable lengths, or torch's fused kernels document
by document. CPU: torch's flash forward, or plain matrix products in blocks of queries; the backward always uses these
blocks. The CPU's flash backward is the slowest kernel of all: for documents of 56 to 450 tokens, 2,016 in all, it takes
32 ms, and this backward 13 ms (SmolLM2's heads, bfloat16, 2 cores).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn

from qlora_service.training.device import has_flash_attention, prefers_block_attention, runs_cpu_kernels

BLOCK = 128
"""Queries computed at a time; keys after the block are never touched."""


@dataclass(frozen=True)
class AttentionShape:
    """The constants of a layer's attention."""

    heads: int
    kv_heads: int
    scale: float
    window: int | None = None
    """A token sees itself and `window - 1` tokens before it; None: all tokens before it"""


@dataclass(frozen=True)
class _Block:
    """Queries [start, end) of a document and the keys [first, end) they see; from `cut` on, a key is hidden from some.

    All positions count from the document's first token.
    """

    start: int
    end: int
    first: int
    cut: int


def document_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int],
    shape: AttentionShape,
    *,
    allow_blocks: bool = False,
) -> torch.Tensor:
    """(tokens, heads, head_dim) of queries (tokens, heads, head_dim), keys and values (tokens, kv_heads, head_dim).

    With `allow_blocks` a CPU may round the scores to the queries' dtype where that is faster, as other kernels do.
    Held-out losses do not allow it: they must be those of torch's own attention, which users of the adapter run.
    """
    if runs_cpu_kernels(q):
        kernel = _block_by_block if allow_blocks and prefers_block_attention(q) else _document_by_document
        attended: torch.Tensor = BlockAttention.apply(q, k, v, tuple(lengths), shape, kernel)
        return attended
    if has_flash_attention(q):
        return _varlen(q, k, v, lengths, shape)
    return _document_by_document(q, k, v, lengths, shape)


class BlockAttention(torch.autograd.Function):
    """`document_attention` on a CPU: the output of `kernel`, and a backward in blocks.

    Only the inputs are saved: recomputing the probabilities costs less than a forward that has to store them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: tuple[int, ...],
        shape: AttentionShape,
        kernel: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        ctx.lengths, ctx.shape = lengths, shape
        ctx.save_for_backward(q, k, v)
        return kernel(q, k, v, lengths, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        """The gradients of q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim).

        Inside a block, `group` is heads / kv_heads * queries: the queries of all heads that share a key.
        """
        q, k, v = ctx.saved_tensors
        shape: AttentionShape = ctx.shape
        grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for begin, stop in pairwise([0, *accumulate(ctx.lengths)]):
            # (heads, document, head_dim), 2 × (kv_heads, document, head_dim)
            queries, keys, values = _by_head(q[begin:stop], k[begin:stop], v[begin:stop], shape)
            grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
            for block in _blocks(stop - begin, shape.window):
                seen = slice(block.first, block.end)
                rows = slice(begin + block.start, begin + block.end)
                scaled = _group(queries[:, block.start : block.end], shape)  # (kv_heads, group, head_dim)
                probabilities = _probabilities(scaled, keys[:, seen], block, shape)  # (kv_heads, group, seen)
                grad_block = _group(grad_output[rows].transpose(0, 1), shape)  # (kv_heads, group, head_dim)
                grad_values[:, seen].baddbmm_(probabilities.transpose(1, 2), grad_block)
                grad_probabilities = torch.bmm(grad_block, values[:, seen].transpose(1, 2))  # (kv_heads, group, seen)
                grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, probabilities.dtype)
                grad_q[rows] = _ungroup(torch.bmm(grad_scores, keys[:, seen]), shape)
                grad_keys[:, seen].baddbmm_(grad_scores.transpose(1, 2), scaled)
            grad_k[begin:stop] = grad_keys.transpose(0, 1)
            grad_v[begin:stop] = grad_values.transpose(0, 1)
        return grad_q.mul_(shape.scale), grad_k, grad_v, None, None, None


def _varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], shape: AttentionShape
) -> torch.Tensor:
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=q.device)  # (documents + 1,)
    longest = max(lengths)
    # A window of (w, 0) is the token itself and w tokens before it; -1 means no bound.
    left = -1 if shape.window is None else shape.window - 1
    grouped = shape.heads != shape.kv_heads
    output: torch.Tensor = varlen_attn(  # type: ignore[assignment]  # a tuple only if `return_aux` is set
        q, k, v, ends, ends, longest, longest, scale=shape.scale, window_size=(left, 0), enable_gqa=grouped
    )
    return output  # (tokens, heads, head_dim)


def _document_by_document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], shape: AttentionShape
) -> torch.Tensor:
    outputs = []
    # split, not slices: under autograd every slice creates a gradient of the full size.
    for query, key, value in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        tokens = query.shape[0]
        mask = None
        if shape.window is not None and tokens > shape.window:
            mask = _in_window(0, tokens, 0, shape.window, q.device)  # (tokens, tokens)
        output = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=shape.scale,
            enable_gqa=shape.heads != shape.kv_heads,
        )  # (1, heads, tokens, head_dim)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def _block_by_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], shape: AttentionShape
) -> torch.Tensor:
    """Matrix products in blocks of queries; heads that share a key are stacked over it, as in the backward."""
    output = torch.empty_like(q, memory_format=torch.contiguous_format)  # (tokens, heads, head_dim)
    for begin, stop in pairwise([0, *accumulate(lengths)]):
        # (heads, document, head_dim), 2 × (kv_heads, document, head_dim)
        queries, keys, values = _by_head(q[begin:stop], k[begin:stop], v[begin:stop], shape)
        for block in _blocks(stop - begin, shape.window):
            seen = slice(block.first, block.end)
            scaled = _group(queries[:, block.start : block.end], shape)  # (kv_heads, group, head_dim)
            probabilities = _probabilities(scaled, keys[:, seen], block, shape)  # (kv_heads, group, seen)
            output[begin + block.start : begin + block.end] = _ungroup(torch.bmm(probabilities, values[:, seen]), shape)
    return output


def _blocks(tokens: int, window: int | None) -> Iterator[_Block]:
    for start in range(0, tokens, BLOCK):
        first = 0 if window is None else max(0, start - window + 1)
        yield _Block(start, min(start + BLOCK, tokens), first, start if window is None else first)


def _by_head(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: AttentionShape
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One document's queries (heads, tokens, head_dim), scaled, and keys and values (kv_heads, tokens, head_dim)."""
    # The scale is applied to the queries because they have fewer elements than the scores.
    return (q * shape.scale).transpose(0, 1), k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()


def _group(x: torch.Tensor, shape: AttentionShape) -> torch.Tensor:
    """(heads, tokens, head_dim) with the heads that share a key stacked: (kv_heads, heads / kv_heads * tokens, …)."""
    return x.reshape(shape.kv_heads, -1, x.shape[-1])


def _ungroup(x: torch.Tensor, shape: AttentionShape) -> torch.Tensor:
    """The inverse of `_group`, transposed to (tokens, heads, head_dim)."""
    return x.view(shape.heads, -1, x.shape[-1]).transpose(0, 1)


def _probabilities(queries: torch.Tensor, keys: torch.Tensor, block: _Block, shape: AttentionShape) -> torch.Tensor:
    """(kv_heads, heads / kv_heads * queries, keys) of scaled queries and the keys they see."""
    scores = torch.bmm(queries, keys.transpose(1, 2))  # (kv_heads, heads / kv_heads * queries, keys)
    by_query = scores.view(shape.heads, block.end - block.start, block.end - block.first)  # (heads, queries, keys)
    by_query[:, :, block.cut - block.first :].add_(_bias(block, shape.window, queries.dtype))
    return torch.softmax(scores, -1)


def _bias(block: _Block, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """(queries, keys from `cut` on), 0 where a query sees the key and -inf where it does not."""
    if window is None:
        return _triangle(block.end - block.start, dtype)
    visible = _in_window(block.start, block.end, block.cut, window, torch.device("cpu"))  # (queries, keys)
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))


@lru_cache(maxsize=2 * BLOCK)
def _triangle(tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """The causal bias (tokens, tokens): -inf above the diagonal."""
    return torch.full((tokens, tokens), float("-inf"), dtype=dtype).triu_(1)


def _in_window(start: int, end: int, first: int, window: int, device: torch.device) -> torch.Tensor:
    """(queries, keys), True where query start + i sees key first + j."""
    distance = torch.arange(start, end, device=device)[:, None] - torch.arange(first, end, device=device)
    return (distance >= 0) & (distance < window)
