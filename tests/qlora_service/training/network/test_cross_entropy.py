"""Losses and gradients equal those of cross-entropy over full logits, which are never created."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qlora_service.training.network.cross_entropy import TokenLosses, chunked_losses, fused_losses, logit_losses
from qlora_service.training.sizes import HEAD_CHUNK
from tests.judges import LargestTensor

VOCABULARY, HIDDEN = 300, 16
COUNTS = [1, HEAD_CHUNK - 1, HEAD_CHUNK, HEAD_CHUNK + 1, 2 * HEAD_CHUNK + 17]


def inputs(count: int, dtype: torch.dtype = torch.float64, vocabulary: int = VOCABULARY) -> tuple[torch.Tensor, ...]:
    """Hidden states, the head, targets, and the gradient of each loss."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocabulary, (count,), generator=generator)
    grad_nll = torch.randn(count, generator=generator, dtype=torch.float64)
    return hidden, weight, targets, grad_nll


@pytest.mark.parametrize("count", COUNTS)
def test_a_frozen_head_gives_the_losses_and_gradients_of_cross_entropy(count: int) -> None:
    """Each loss has its own incoming gradient, as from a preference objective."""
    hidden, weight, targets, grad_nll = inputs(count)
    logits = hidden @ weight.t()
    expected = F.cross_entropy(logits, targets, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected, hidden, grad_nll)
    losses = fused_losses(hidden, weight, targets)
    assert (losses.nll - expected).abs().max() < 1e-12
    assert torch.equal(losses.hits, logits.argmax(-1) == targets)
    (gradient,) = torch.autograd.grad(losses.nll, hidden, grad_nll)
    assert (gradient - expected_gradient).abs().max() < 1e-12


@pytest.mark.parametrize("count", COUNTS)
def test_a_trained_head_gets_its_gradients_too(count: int) -> None:
    hidden, weight, targets, grad_nll = inputs(count)
    weight.requires_grad_()
    bias = torch.randn(VOCABULARY, dtype=torch.float64, requires_grad=True)
    logits = 0.5 * F.linear(hidden, weight, bias)
    expected = F.cross_entropy(logits, targets, reduction="none")
    inputs_with_gradient = (hidden, weight, bias)
    expected_gradients = torch.autograd.grad(expected, inputs_with_gradient, grad_nll)
    losses = chunked_losses(hidden, lambda states: 0.5 * F.linear(states, weight, bias), targets)
    assert (losses.nll - expected).abs().max() < 1e-12
    assert torch.equal(losses.hits, logits.argmax(-1) == targets)
    gradients = torch.autograd.grad(losses.nll, inputs_with_gradient, grad_nll)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert (gradient - expected_gradient).abs().max() < 1e-12


def test_logit_losses_equal_cross_entropy() -> None:
    hidden, weight, targets, _ = inputs(20)
    logits = hidden @ weight.t()
    losses = logit_losses(logits, targets)
    assert torch.equal(losses.nll, F.cross_entropy(logits, targets, reduction="none"))
    assert torch.equal(losses.hits, logits.argmax(-1) == targets)
    assert losses.nll.requires_grad


def test_float32_losses_are_within_1e_5_of_float64() -> None:
    """For comparison: over 49,152 words, torch's own cross_entropy in float32 is too low by about as much."""
    hidden, weight, targets, _ = inputs(300, vocabulary=49_152)
    exact = fused_losses(hidden, weight, targets).nll
    nll = fused_losses(hidden.float(), weight.float(), targets).nll
    assert nll.dtype is torch.float32
    assert ((nll - exact).abs() / exact).max() < 1e-5


def test_bfloat16_losses_are_float32_and_close() -> None:
    hidden, weight, targets, grad_nll = inputs(300, torch.bfloat16, vocabulary=5_000)
    exact_hidden = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(exact_hidden @ weight.double().t(), targets, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected, exact_hidden, grad_nll)
    losses = fused_losses(hidden, weight, targets)
    assert losses.nll.dtype is torch.float32
    assert (losses.nll - expected).abs().max() < 0.15  # logits up to 30 are rounded by up to 2⁻⁴, twice
    assert abs(losses.nll.mean() - expected.mean()) < 2e-3
    (gradient,) = torch.autograd.grad(losses.nll, hidden, grad_nll.float())
    assert gradient.dtype is torch.bfloat16
    assert (gradient - expected_gradient).abs().max() < 3e-2 * expected_gradient.abs().max()


def test_enormous_logits_do_not_overflow() -> None:
    hidden, weight, targets, _ = inputs(10, torch.float32)
    large = (1e4 * hidden).detach().requires_grad_()
    losses = fused_losses(large, weight, targets)
    assert losses.nll.isfinite().all()
    losses.nll.sum().backward()
    assert large.grad is not None
    assert large.grad.isfinite().all()


def test_a_nan_state_has_a_nan_loss() -> None:
    hidden, weight, targets, _ = inputs(3, torch.float32)
    poisoned = hidden.detach().clone()
    poisoned[1] = float("nan")
    assert fused_losses(poisoned, weight, targets).nll.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("is_trained", [False, True])
def test_logits_never_exist_for_more_than_a_chunk(is_trained: bool) -> None:
    vocabulary = 2_000
    hidden, weight, targets, _ = inputs(4 * HEAD_CHUNK, torch.float32, vocabulary)
    with LargestTensor() as largest:
        if is_trained:
            losses = chunked_losses(hidden, lambda states: states @ weight.t(), targets)
        else:
            losses = fused_losses(hidden, weight, targets)
        losses.nll.sum().backward()
    assert largest.elements <= HEAD_CHUNK * vocabulary


def test_losses_of_states_without_gradient_have_none() -> None:
    hidden, weight, targets, _ = inputs(5)
    for losses in (
        fused_losses(hidden.detach(), weight, targets),
        chunked_losses(hidden.detach(), lambda states: states @ weight.t(), targets),
    ):
        assert not losses.nll.requires_grad


def test_joined_losses_are_concatenated() -> None:
    hidden, weight, targets, _ = inputs(7)
    whole = fused_losses(hidden, weight, targets)
    parts = [fused_losses(hidden[:3], weight, targets[:3]), fused_losses(hidden[3:], weight, targets[3:])]
    joined = TokenLosses.joined(parts)
    assert (joined.nll - whole.nll).abs().max() < 1e-12
    assert torch.equal(joined.hits, whole.hits)
