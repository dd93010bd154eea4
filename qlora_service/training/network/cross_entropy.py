"""Cross-entropy of each trained token from hidden states, a few positions at a time.

Logits are the largest tensor a training step can create: 2,048 tokens of a 128,000-word vocabulary are 1 GB in float32,
and their gradient another. Here they exist for `HEAD_CHUNK` positions, and only where the next token is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from qlora_service.training.device import runs_cpu_kernels
from qlora_service.training.network.elementwise import upcast
from qlora_service.training.sizes import CPU_ROWS, HEAD_CHUNK


@dataclass(frozen=True)
class TokenLosses:
    """Loss and correctness of N trained tokens."""

    nll: torch.Tensor
    """(N,) cross-entropy in nats, float32 or float64"""
    hits: torch.Tensor
    """(N,) True where the token was the most likely one"""

    @classmethod
    def joined(cls, parts: Sequence[TokenLosses]) -> TokenLosses:
        """The losses of all parts, concatenated."""
        return cls(torch.cat([part.nll for part in parts]), torch.cat([part.hits for part in parts]))


def fused_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> TokenLosses:
    """Losses of (N, hidden) states under a frozen head (vocabulary, hidden); forward already computes the gradient."""
    return TokenLosses(*FrozenHead.apply(hidden, weight, targets))


def chunked_losses(
    hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], targets: torch.Tensor
) -> TokenLosses:
    """Losses of (N, hidden) states under any head, frozen or trained; backward recomputes each chunk's logits."""
    nll, hits = [], []
    for states, target in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
        losses = checkpoint(_chunk_losses, head, states, target, use_reentrant=False)
        nll.append(losses[0])  # (chunk,)
        hits.append(losses[1])  # (chunk,)
    return TokenLosses(torch.cat(nll), torch.cat(hits))


def logit_losses(logits: torch.Tensor, targets: torch.Tensor) -> TokenLosses:
    """The losses of (N, vocabulary) logits."""
    max_logit = logits.detach().amax(-1)  # (N,)
    target_logit = logits.detach().gather(1, targets[:, None])[:, 0]  # (N,)
    return TokenLosses(F.cross_entropy(upcast(logits), targets, reduction="none"), target_logit >= max_logit)


class FrozenHead(torch.autograd.Function):
    """Cross-entropy under a frozen head.

    The gradient of nll with respect to the logits is softmax minus one at the target. Only its product with the head,
    (N, hidden), is kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = hidden.shape[0]
        nll = upcast(hidden.new_empty(0)).new_empty(count)  # (N,)
        hits = torch.empty(count, dtype=torch.bool, device=hidden.device)  # (N,)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # (N, hidden)
        for start in range(0, count, HEAD_CHUNK):
            rows = slice(start, min(start + HEAD_CHUNK, count))
            target = targets[rows, None]  # (chunk, 1)
            logits = hidden[rows] @ weight.t()  # (chunk, vocabulary)
            target_logit = upcast(logits.gather(1, target))  # (chunk, 1)
            max_logit = upcast(logits.amax(-1, keepdim=True))  # (chunk, 1)
            # The most likely token's probability is exp(0) over the sum of all exponentials.
            max_probability = _softmax_(logits)  # (chunk, 1); logits now holds the probabilities
            nll[rows] = (max_logit - target_logit - max_probability.log())[:, 0]
            hits[rows] = (target_logit >= max_logit)[:, 0]
            if grad_hidden is not None:
                grad_hidden[rows] = (upcast(logits @ weight) - upcast(weight[target[:, 0]])).to(hidden.dtype)
            del logits  # otherwise two chunks of logits exist at once
        ctx.save_for_backward(grad_hidden)
        ctx.mark_non_differentiable(hits)
        return nll, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_hidden,) = ctx.saved_tensors  # (N, hidden), for a grad_nll of ones
        return (upcast(grad_hidden) * grad_nll[:, None]).to(grad_hidden.dtype), None, None


def _softmax_(logits: torch.Tensor) -> torch.Tensor:
    """Replaces (rows, vocabulary) logits by their softmax; returns its maximum before rounding, (rows, 1)."""
    max_probabilities = []
    for rows in logits.split(CPU_ROWS if runs_cpu_kernels(logits) else logits.shape[0]):
        probabilities = torch.softmax(upcast(rows), -1)  # (rows, vocabulary)
        max_probabilities.append(probabilities.amax(-1, keepdim=True))
        rows.copy_(probabilities)
    return torch.cat(max_probabilities)


def _chunk_losses(
    head: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """nll and hits of a chunk, (chunk,) each, as the tuple of tensors that `checkpoint` needs."""
    losses = logit_losses(head(states), targets)
    return losses.nll, losses.hits
