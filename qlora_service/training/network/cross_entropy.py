"""From hidden states to the loss of each learned token, without the logits of more than a few positions at a time.

Logits are the largest thing a training step can make: 2,048 tokens of a 128,000-word vocabulary are 1 GB in float32,
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

from qlora_service.training.device import computes_as_cpu
from qlora_service.training.network.elementwise import wide
from qlora_service.training.sizes import CPU_ROWS, HEAD_CHUNK


@dataclass(frozen=True)
class TokenLosses:
    """What a forward pass says of N learned tokens."""

    nll: torch.Tensor
    """(N,) cross-entropy in nats, float32 or float64"""
    hits: torch.Tensor
    """(N,) True where the token was the most likely one"""

    @classmethod
    def joined(cls, parts: Sequence[TokenLosses]) -> TokenLosses:
        """The losses of one part behind those of the other."""
        return cls(torch.cat([part.nll for part in parts]), torch.cat([part.hits for part in parts]))


def fused_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> TokenLosses:
    """Losses of (N, hidden) states under a frozen head (vocabulary, hidden); the gradient is made on the way."""
    return TokenLosses(*FrozenHead.apply(hidden, weight, targets))


class FrozenHead(torch.autograd.Function):
    """The gradient of nll is softmax minus the target's one; its product with the head is all that is kept of it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = hidden.shape[0]
        nll = wide(hidden.new_empty(0)).new_empty(count)
        hits = torch.empty(count, dtype=torch.bool, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, count, HEAD_CHUNK):
            rows = slice(start, min(start + HEAD_CHUNK, count))
            target = targets[rows, None]
            logits = hidden[rows] @ weight.t()  # (chunk, vocabulary)
            of_target = wide(logits.gather(1, target))
            highest = wide(logits.amax(-1, keepdim=True))
            # The likeliest token's probability is exp(0) over the sum of all exponentials.
            likeliest = _softmax_(logits)
            nll[rows] = (highest - of_target - likeliest.log())[:, 0]
            hits[rows] = (of_target >= highest)[:, 0]
            if of_hidden is not None:
                of_hidden[rows] = (wide(logits @ weight) - wide(weight[target[:, 0]])).to(hidden.dtype)
            del logits  # else the next chunk's are made beside them
        ctx.save_for_backward(of_hidden)
        ctx.mark_non_differentiable(hits)
        return nll, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_nll: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (of_hidden,) = ctx.saved_tensors
        return (wide(of_hidden) * of_nll[:, None]).to(of_hidden.dtype), None, None


def _softmax_(logits: torch.Tensor) -> torch.Tensor:
    """The softmax in place, and its largest probability before that is rounded, (rows, 1)."""
    likeliest = []
    for rows in logits.split(CPU_ROWS if computes_as_cpu(logits) else logits.shape[0]):
        probabilities = torch.softmax(wide(rows), -1)
        likeliest.append(probabilities.amax(-1, keepdim=True))
        rows.copy_(probabilities)
    return torch.cat(likeliest)


def chunked_losses(
    hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], targets: torch.Tensor
) -> TokenLosses:
    """The same for any head, also one that is trained: each chunk's logits are computed again in the backward pass."""
    nll, hits = [], []
    for states, target in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
        losses = checkpoint(_chunk, head, states, target, use_reentrant=False)
        nll.append(losses[0])
        hits.append(losses[1])
    return TokenLosses(torch.cat(nll), torch.cat(hits))


def logit_losses(logits: torch.Tensor, targets: torch.Tensor) -> TokenLosses:
    """The losses of (N, vocabulary) logits."""
    highest = logits.detach().amax(-1)
    of_target = logits.detach().gather(1, targets[:, None])[:, 0]
    return TokenLosses(F.cross_entropy(wide(logits), targets, reduction="none"), of_target >= highest)


def _chunk(
    head: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    losses = logit_losses(head(states), targets)
    return losses.nll, losses.hits
