"""What a step's loss is made of. Each objective sums over the whole step and divides once.

`of_step` sees the whole step and returns the function that gives a micro-batch's share of its loss; the shares sum to
the step's loss, however it is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from qlora_service.domain.jobs import FailureReason
from qlora_service.errors import JobFailed
from qlora_service.specs import Dpo, Kto, Objective, Orpo
from qlora_service.training.device import is_out_of_memory, release_memory
from qlora_service.training.network.cross_entropy import TokenLosses
from qlora_service.training.network.micro_batch import LabelledRow, PreferencePair, TokenRow, TrainingExample
from qlora_service.training.network.network import Network

CERTAIN = -1e-6
"""Log-probability above which the odds of an answer are cut off: at 0 they are infinite."""


class Compute(Protocol):
    """Losses of documents, with the adapter or of the bare base: `Network.losses` or `Network.evaluate`."""

    def __call__(self, documents: Sequence[TokenRow], *, adapter: bool = True) -> TokenLosses: ...


@dataclass(frozen=True)
class Share:
    """A micro-batch's part of the step's loss, and of the figures beside it."""

    total: torch.Tensor
    """(); the shares of a step sum to its loss"""
    each: torch.Tensor
    """(examples,) each example's own loss, detached"""
    hits: torch.Tensor
    """(anything,) True where the model was right: tokens, or pairs, or labels"""


ShareOf = Callable[[Sequence[TrainingExample]], Share]


@dataclass(frozen=True)
class Evaluation:
    """What the held-out examples say."""

    loss: float
    """The objective's, over all of them: nats per learned token when supervised"""
    accuracy: float
    """Share of learned tokens that were the most likely ones; of pairs ranked right; of labels told right"""
    perplexity: float | None = None
    """exp(loss), where the loss is one of tokens"""


class TrainingObjective(Protocol):
    """A way to make a loss of examples."""

    def of_step(self, network: Network, examples: Sequence[TrainingExample], compute: Compute) -> ShareOf:
        """The function of the step's micro-batches."""
        ...


class SupervisedObjective:
    """The sum over the learned tokens divided by their number."""

    def of_step(self, network: Network, examples: Sequence[TrainingExample], compute: Compute) -> ShareOf:
        tokens = sum(document.trained_tokens for example in examples for document in example.documents)

        def share(members: Sequence[TrainingExample]) -> Share:
            documents = [document for member in members for document in member.documents]
            losses = compute(documents)
            means = [part.mean() for part in _by_document(losses.nll.detach(), documents)]
            return Share(losses.nll.sum() / tokens, torch.stack(means), losses.hits)

        return share


@dataclass(frozen=True)
class DpoObjective:
    """-log σ(β (policy margin - reference margin)) per pair, divided by the pairs."""

    spec: Dpo

    def of_step(self, network: Network, examples: Sequence[TrainingExample], compute: Compute) -> ShareOf:
        beta, smoothing = self.spec.beta, self.spec.label_smoothing

        def share(members: Sequence[TrainingExample]) -> Share:
            ratio = _log_ratios(compute, _answers(members, PreferencePair))
            margin = beta * (ratio[::2] - ratio[1::2])  # (pairs,)
            losses = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
            return Share(losses.sum() / len(examples), losses.detach(), margin.detach() > 0)

        return share


@dataclass(frozen=True)
class OrpoObjective:
    """The chosen answer's mean loss plus β times -log σ(log odds ratio) per pair, divided by the pairs.

    Odds are of the answers' mean log-probability per token (section 4.1); the first term is of the answer's tokens.
    """

    spec: Orpo

    def of_step(self, network: Network, examples: Sequence[TrainingExample], compute: Compute) -> ShareOf:
        def share(members: Sequence[TrainingExample]) -> Share:
            documents = _answers(members, PreferencePair)
            losses = compute(documents)
            mean = torch.stack([-part.mean() for part in _by_document(losses.nll, documents)])
            chosen, rejected = mean[::2], mean[1::2]
            ratio = _log_odds(chosen) - _log_odds(rejected)
            each = -chosen - self.spec.beta * F.logsigmoid(ratio)
            return Share(each.sum() / len(examples), each.detach(), ratio.detach() > 0)

        return share


@dataclass(frozen=True)
class KtoObjective:
    """w (1 - σ(± β (log ratio - baseline))) per example, divided by the examples.

    The baseline is the mean log ratio of answers that belong to another question of the step, at least 0 and without a
    gradient: one figure for the whole step, known before its first micro-batch.
    """

    spec: Kto

    def of_step(self, network: Network, examples: Sequence[TrainingExample], compute: Compute) -> ShareOf:
        baseline = self._baseline(network, _answers(examples, LabelledRow))

        def share(members: Sequence[TrainingExample]) -> Share:
            ratio = _log_ratios(compute, _answers(members, LabelledRow))
            wanted = [isinstance(member, LabelledRow) and member.desirable for member in members]
            sign = ratio.new_tensor([1.0 if good else -1.0 for good in wanted])
            weight = ratio.new_tensor([self._weight(good) for good in wanted])
            gain = self.spec.beta * sign * (ratio - baseline)
            each = weight * torch.sigmoid(-gain)
            return Share(each.sum() / len(examples), each.detach(), gain.detach() > 0)

        return share

    def _weight(self, desirable: bool) -> float:
        return self.spec.desirable_weight if desirable else self.spec.undesirable_weight

    def _baseline(self, network: Network, answers: Sequence[TokenRow]) -> torch.Tensor:
        if len(answers) < 2:
            return torch.zeros(())  # there is no other answer
        mismatched = [
            _with_answer_of(row, other) for row, other in zip(answers, [*answers[1:], answers[0]], strict=True)
        ]
        return _log_ratios(network.evaluate, mismatched).mean().clamp(min=0)  # NaN stays NaN


def make_objective(spec: Objective) -> TrainingObjective:
    """The objective that the spec asks for."""
    if isinstance(spec, Dpo):
        return DpoObjective(spec)
    if isinstance(spec, Orpo):
        return OrpoObjective(spec)
    return KtoObjective(spec) if isinstance(spec, Kto) else SupervisedObjective()


@torch.no_grad()
def evaluate(network: Network, objective: TrainingObjective, examples: Sequence[TrainingExample]) -> Evaluation:
    """The objective's loss over all examples, as if they were one step.

    Raises:
        JobFailed: the device has no memory for one of them alone, which is named.
    """
    with network.evaluating():
        share_of = objective.of_step(network, examples, network.evaluate)
        shares = [_share_alone(share_of, example, network.device) for example in examples]
    loss = math.fsum(float(share.total) for share in shares)
    hits = torch.cat([share.hits for share in shares])
    perplexity = math.exp(min(loss, 700.0)) if isinstance(objective, SupervisedObjective) else None
    return Evaluation(loss, float(hits.float().mean()), perplexity)


def _share_alone(share_of: ShareOf, example: TrainingExample, device: torch.device) -> Share:
    """The share of one example; tried again once with what was cached given back. Raises: JobFailed."""
    for _ in range(2):
        try:
            return share_of([example])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the except block: the error's traceback holds the tensors of the pass that failed.
        release_memory(device)
    tokens = max(len(document.input_ids) for document in example.documents)
    raise JobFailed(
        f"the row of line {example.line} has {tokens} tokens, for which the device has no memory even without "
        "gradients: lower training.max_seq_len_tokens below that, or take a smaller base model",
        reason=FailureReason.OUT_OF_MEMORY,
        line=example.line,
        tokens=tokens,
    )


def _answers(examples: Sequence[TrainingExample], kind: type[PreferencePair | LabelledRow]) -> list[TokenRow]:
    assert all(isinstance(example, kind) for example in examples)
    return [document for example in examples for document in example.documents]


def _by_document(values: torch.Tensor, documents: Sequence[TokenRow]) -> tuple[torch.Tensor, ...]:
    return values.split([document.trained_tokens for document in documents])


def _log_ratios(compute: Compute, documents: Sequence[TokenRow]) -> torch.Tensor:
    """(documents,) log π - log π_ref of each one's learned tokens; π_ref is the base without the adapter.

    Subtracted token by token: the two sums are large and nearly equal, and float32 rounds them.
    """
    reference = compute(documents, adapter=False).nll  # first, before the policy's activations are there
    ratios = reference - compute(documents).nll
    return torch.stack([part.sum() for part in _by_document(ratios, documents)])


def _log_odds(log_probability: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of log p."""
    bounded = log_probability.clamp(max=CERTAIN)
    return bounded - torch.log(-torch.expm1(bounded))


def _with_answer_of(row: TokenRow, other: TokenRow) -> TokenRow:
    """The question of one row with the answer of another, no longer than the longer of the two.

    An answer is everything from its first learned token on: also what tools returned between its messages.
    """
    question, answer = (list(one.trained).index(True, 1) for one in (row, other))
    limit = max(len(row.input_ids), len(other.input_ids))
    ids = [*row.input_ids[:question], *other.input_ids[answer:]][:limit]
    trained = [*[False] * question, *other.trained[answer:]][:limit]
    return TokenRow(row.line, ids, trained)
