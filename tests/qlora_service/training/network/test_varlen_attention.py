"""Attention of each document with itself alone, against a softmax under an explicit mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from qlora_service.training.network.varlen_attention import (
    BLOCK,
    AttentionShape,
    BlockAttention,
    _block_by_block,
    _document_by_document,
    document_attention,
)

LENGTHS = {
    "one token": [1],
    "short ones": [7, 1, 30, 2],
    "around a block": [BLOCK - 1, BLOCK, BLOCK + 1],
    "many blocks": [5 * BLOCK, 5, 4 * BLOCK + 1],
}


def plain_attention(qkv: torch.Tensor, lengths: Sequence[int], shape: AttentionShape) -> torch.Tensor:
    """(tokens, heads, head_dim) with one mask over all documents, one softmax, and repeated keys and values."""
    q, k, v = qkv.transpose(0, 1).split([shape.heads, shape.kv_heads, shape.kv_heads])
    k, v = (x.repeat_interleave(shape.heads // shape.kv_heads, 0) for x in (k, v))
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    position = torch.cat([torch.arange(length) for length in lengths])
    distance = position[:, None] - position
    visible = (document[:, None] == document) & (distance >= 0)
    if shape.window is not None:
        visible &= distance < shape.window
    scores = (q @ k.transpose(1, 2) * shape.scale).masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1)


def attend(
    qkv: torch.Tensor,
    lengths: Sequence[int],
    shape: AttentionShape,
    attention: Callable[..., torch.Tensor] = document_attention,
) -> torch.Tensor:
    """Attention of queries, keys and values that are slices of one tensor, like the output of one projection."""
    return attention(*qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], 1), lengths, shape)


def block_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], shape: AttentionShape
) -> torch.Tensor:
    """The kernel of the fast path, even on a CPU that prefers the other one."""
    output: torch.Tensor = BlockAttention.apply(q, k, v, tuple(lengths), shape, _block_by_block)
    return output


def random_qkv(lengths: Sequence[int], shape: AttentionShape, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    heads = shape.heads + 2 * shape.kv_heads
    return torch.randn(sum(lengths), heads, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("window", [None, 1, 5, BLOCK, 300])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("case", LENGTHS)
def test_outputs_and_gradients_are_those_of_a_masked_softmax(
    case: str, heads: tuple[int, int], window: int | None
) -> None:
    lengths, shape = LENGTHS[case], AttentionShape(*heads, scale=0.3, window=window)
    qkv = random_qkv(lengths, shape)
    expected = plain_attention(qkv, lengths, shape)
    grad_output = torch.randn_like(expected)
    (expected_gradient,) = torch.autograd.grad(expected, qkv, grad_output)
    # The second runs on CUDA devices without flash attention, the third on CPUs without AMX; both run on any device.
    for attention in (document_attention, _document_by_document, block_attention):
        output = attend(qkv, lengths, shape, attention)
        assert (output - expected).abs().max() < 1e-12
        (gradient,) = torch.autograd.grad(output, qkv, grad_output)
        assert (gradient - expected_gradient).abs().max() < 1e-12


@pytest.mark.parametrize("attention", [document_attention, block_attention])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision_stays_close(dtype: torch.dtype, bound: float, attention: Callable[..., torch.Tensor]) -> None:
    lengths, shape = [200, 30], AttentionShape(4, 2, scale=8**-0.5)
    exact, rounded = random_qkv(lengths, shape), random_qkv(lengths, shape, dtype)
    output = attend(rounded, lengths, shape, attention)
    assert output.dtype is dtype
    assert (output - plain_attention(exact, lengths, shape)).abs().max() < bound
    (gradient,) = torch.autograd.grad(output.sum(), rounded)
    (expected,) = torch.autograd.grad(plain_attention(exact, lengths, shape).sum(), exact)
    assert (gradient - expected).abs().max() < bound * expected.abs().max()


def test_large_scores_do_not_overflow() -> None:
    shape = AttentionShape(2, 1, scale=100.0)
    qkv = random_qkv([40], shape, torch.float32)
    output = attend(qkv, [40], shape)
    assert output.isfinite().all()
    assert torch.autograd.grad(output.sum(), qkv)[0].isfinite().all()


def test_a_document_is_independent_of_its_neighbors() -> None:
    """Bit for bit, forward and backward."""
    shape = AttentionShape(4, 2, scale=0.3)
    qkv = random_qkv([40, 50, 60], shape, torch.float32)
    other = qkv.detach().clone()
    other[:40] += 3.0
    other[90:] -= 3.0
    other.requires_grad_()
    outputs = [attend(x, [40, 50, 60], shape) for x in (qkv, other)]
    assert torch.equal(outputs[0][40:90], outputs[1][40:90])
    gradients = [torch.autograd.grad(y[40:90].sum(), x)[0] for y, x in zip(outputs, (qkv, other), strict=True)]
    assert torch.equal(gradients[0], gradients[1])
    assert not gradients[0][:40].any()
    assert not gradients[0][90:].any()


def test_saved_bytes_grow_linearly_with_the_tokens_of_a_document() -> None:
    shape = AttentionShape(4, 2, scale=0.3)

    def kept(tokens: int) -> int:
        saved: list[int] = []

        def keep(x: torch.Tensor) -> torch.Tensor:
            saved.append(x.nbytes)
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            attend(random_qkv([tokens], shape), [tokens], shape)
        return sum(saved)

    assert kept(4 * BLOCK) == 2 * kept(2 * BLOCK)
