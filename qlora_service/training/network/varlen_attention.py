"""Causal attention of each document with itself alone, over several documents laid behind each other.

What runs differs by device: on CUDA flash attention over variable lengths (torch's own), or torch's fused kernels
document by document; on a CPU torch's flash forward, or plain matrix products in blocks of queries, and these as the
backward. The CPU's flash backward is the slowest kernel of all: documents of 56 to 450 tokens, 2,016 in all, take 32 ms
in it, 13 in this one (SmolLM2's heads, bfloat16, 2 cores).
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

from qlora_service.training.device import computes_as_cpu, has_flash_attention, multiplies_faster

BLOCK = 128
"""Queries computed at a time; keys behind the block are never touched."""


@dataclass(frozen=True)
class AttentionShape:
    """What does not change between two layers' calls."""

    heads: int
    kv_heads: int
    scale: float
    window: int | None = None
    """A token sees itself and `window - 1` before it; None: all before it"""


def document_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int],
    shape: AttentionShape,
    *,
    in_blocks: bool = False,
) -> torch.Tensor:
    """(tokens, heads, head_dim) of queries (tokens, heads, head_dim), keys and values (tokens, kv_heads, head_dim).

    With `in_blocks` a CPU may round the scores to the queries' dtype, where that is faster: as other kernels do, but
    held-out losses are to be those of torch's own, which everybody else gets.
    """
    if computes_as_cpu(q):
        forward = _in_blocks if in_blocks and multiplies_faster(q) else _document_by_document
        mixed: torch.Tensor = BlockAttention.apply(q, k, v, tuple(lengths), shape, forward)
        return mixed
    if has_flash_attention(q):
        return _varlen(q, k, v, lengths, shape)
    return _document_by_document(q, k, v, lengths, shape)


def _varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], shape: AttentionShape
) -> torch.Tensor:
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=q.device)
    longest = max(lengths)
    # A window of (w, 0) is the token itself and w before it; -1 is no bound.
    left = -1 if shape.window is None else shape.window - 1
    grouped = shape.heads != shape.kv_heads
    output: torch.Tensor = varlen_attn(  # type: ignore[assignment]  # a tuple only where more is asked for
        q, k, v, ends, ends, longest, longest, scale=shape.scale, window_size=(left, 0), enable_gqa=grouped
    )
    return output


def _document_by_document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], shape: AttentionShape
) -> torch.Tensor:
    outputs = []
    # split, not slices: under autograd every slice makes a gradient of the full size.
    for query, key, value in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        tokens = query.shape[0]
        mask = None
        if shape.window is not None and tokens > shape.window:
            mask = _in_window(0, tokens, 0, shape.window, q.device)
        output = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=shape.scale,
            enable_gqa=shape.heads != shape.kv_heads,
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


@dataclass(frozen=True)
class _Block:
    """Queries [start, end) of a document, the keys [first, end) that they see, those from `cut` on not all of them."""

    start: int
    end: int
    first: int
    cut: int


def _blocks(tokens: int, window: int | None) -> Iterator[_Block]:
    for start in range(0, tokens, BLOCK):
        first = 0 if window is None else max(0, start - window + 1)
        yield _Block(start, min(start + BLOCK, tokens), first, start if window is None else first)


class BlockAttention(torch.autograd.Function):
    """`document_attention` on a CPU: `forward`'s outputs, and a backward in blocks.

    Only the inputs are kept: making the probabilities again costs less than a forward that has to store them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: tuple[int, ...],
        shape: AttentionShape,
        forward: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        ctx.lengths, ctx.shape = lengths, shape
        ctx.save_for_backward(q, k, v)
        return forward(q, k, v, lengths, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        q, k, v = ctx.saved_tensors
        shape: AttentionShape = ctx.shape
        of_q, of_k, of_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for begin, stop in pairwise([0, *accumulate(ctx.lengths)]):
            queries, keys, values = _by_head(q[begin:stop], k[begin:stop], v[begin:stop], shape)
            of_keys, of_values = torch.zeros_like(keys), torch.zeros_like(values)
            for block in _blocks(stop - begin, shape.window):
                seen = slice(block.first, block.end)
                rows = slice(begin + block.start, begin + block.end)
                scaled = _group(queries[:, block.start : block.end], shape)
                p = _probabilities(scaled, keys[:, seen], block, shape)
                g = _group(gradient[rows].transpose(0, 1), shape)
                of_values[:, seen].baddbmm_(p.transpose(1, 2), g)
                of_p = torch.bmm(g, values[:, seen].transpose(1, 2))
                of_scores = torch._softmax_backward_data(of_p, p, -1, p.dtype)
                of_q[rows] = _ungroup(torch.bmm(of_scores, keys[:, seen]), shape)
                of_keys[:, seen].baddbmm_(of_scores.transpose(1, 2), scaled)
            of_k[begin:stop] = of_keys.transpose(0, 1)
            of_v[begin:stop] = of_values.transpose(0, 1)
        return of_q.mul_(shape.scale), of_k, of_v, None, None, None


def _in_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], shape: AttentionShape
) -> torch.Tensor:
    """Matrix products; heads that share a key are stacked over it, as in the backward."""
    output = torch.empty_like(q, memory_format=torch.contiguous_format)
    for begin, stop in pairwise([0, *accumulate(lengths)]):
        queries, keys, values = _by_head(q[begin:stop], k[begin:stop], v[begin:stop], shape)
        for block in _blocks(stop - begin, shape.window):
            seen = slice(block.first, block.end)
            scaled = _group(queries[:, block.start : block.end], shape)
            p = _probabilities(scaled, keys[:, seen], block, shape)
            output[begin + block.start : begin + block.end] = _ungroup(torch.bmm(p, values[:, seen]), shape)
    return output


def _by_head(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: AttentionShape
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One document's queries (heads, tokens, head_dim), scaled, and keys and values (kv_heads, tokens, head_dim)."""
    # The queries are scaled, because there are fewer of them than scores.
    return (q * shape.scale).transpose(0, 1), k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()


def _group(x: torch.Tensor, shape: AttentionShape) -> torch.Tensor:
    """(heads, tokens, head_dim) with the heads that share a key stacked: (kv_heads, heads / kv_heads * tokens, …)."""
    return x.reshape(shape.kv_heads, -1, x.shape[-1])


def _ungroup(x: torch.Tensor, shape: AttentionShape) -> torch.Tensor:
    """Back to (tokens, heads, head_dim)."""
    return x.view(shape.heads, -1, x.shape[-1]).transpose(0, 1)


def _probabilities(queries: torch.Tensor, keys: torch.Tensor, block: _Block, shape: AttentionShape) -> torch.Tensor:
    """(kv_heads, heads / kv_heads * queries, keys) of scaled queries and the keys they see."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    by_query = scores.view(shape.heads, block.end - block.start, block.end - block.first)
    by_query[:, :, block.cut - block.first :].add_(_bias(block, shape.window, queries.dtype))
    return torch.softmax(scores, -1)


@lru_cache(maxsize=2 * BLOCK)
def _triangle(tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((tokens, tokens), float("-inf"), dtype=dtype).triu_(1)


def _bias(block: _Block, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """(queries, keys from `cut` on), 0 where a query sees the key and -inf where it does not."""
    if window is None:
        return _triangle(block.end - block.start, dtype)
    visible = _in_window(block.start, block.end, block.cut, window, torch.device("cpu"))
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))


def _in_window(start: int, end: int, first: int, window: int, device: torch.device) -> torch.Tensor:
    """(queries, keys), True where query start + i may look at key first + j."""
    distance = torch.arange(start, end, device=device)[:, None] - torch.arange(first, end, device=device)
    return (distance >= 0) & (distance < window)
