"""Training objectives: the loss of a step, divided once by the number of its tokens, pairs or examples.

`prepare_step` receives the whole step and returns the function that computes a micro-batch's share of its loss. The
shares sum to the step's loss, however it is cut into micro-batches.
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
from qlora_service.training.network.micro_batch import LabeledRow, PreferencePair, TokenRow, TrainingExample
from qlora_service.training.network.network import Network

MAX_LOG_PROBABILITY = -1e-6
"""Upper bound of an answer's log-probability, because its odds are infinite at 0"""


class ComputeLosses(Protocol):
    """Token losses of documents, with the adapter or of the bare base: `Network.losses` or `Network.evaluate`."""

    def __call__(self, documents: Sequence[TokenRow], *, adapter: bool = True) -> TokenLosses: ...


@dataclass(frozen=True)
class Share:
    """A micro-batch's share of the step's loss, and its metrics."""

    total: torch.Tensor
    """(); the shares of a step sum to its loss"""
    example_losses: torch.Tensor
    """(examples,) loss of each example, detached"""
    hits: torch.Tensor
    """(tokens,), (pairs,) or (examples,): True where the model predicts the token, the ranking or the label"""


ComputeShare = Callable[[Sequence[TrainingExample]], Share]
"""Maps the examples of a micro-batch to its share"""


@dataclass(frozen=True)
class Evaluation:
    """Metrics over the held-out examples."""

    loss: float
    """The objective's loss over all of them: nats per trained token when supervised"""
    accuracy: float
    """Share of trained tokens that are the most likely ones, of pairs ranked right, or of labels predicted right"""
    perplexity: float | None = None
    """exp(loss) when supervised; None for the other objectives"""


class TrainingObjective(Protocol):
    """Computes the loss of examples."""

    def prepare_step(
        self, network: Network, examples: Sequence[TrainingExample], compute_losses: ComputeLosses
    ) -> ComputeShare:
        """The function that computes the share of each micro-batch of the step `examples`."""
        ...


class SupervisedObjective:
    """The sum of the losses of the trained tokens, divided by their number."""

    def prepare_step(
        self, network: Network, examples: Sequence[TrainingExample], compute_losses: ComputeLosses
    ) -> ComputeShare:
        tokens = sum(document.trained_tokens for example in examples for document in example.documents)

        def share(micro_batch: Sequence[TrainingExample]) -> Share:
            documents = [document for example in micro_batch for document in example.documents]
            losses = compute_losses(documents)  # nll and hits: (trained tokens of the micro-batch,)
            means = [part.mean() for part in _split_by_document(losses.nll.detach(), documents)]
            return Share(losses.nll.sum() / tokens, torch.stack(means), losses.hits)

        return share


@dataclass(frozen=True)
class DpoObjective:
    """-log σ(β (policy margin - reference margin)) per pair, divided by the number of pairs."""

    spec: Dpo

    def prepare_step(
        self, network: Network, examples: Sequence[TrainingExample], compute_losses: ComputeLosses
    ) -> ComputeShare:
        beta, smoothing = self.spec.beta, self.spec.label_smoothing

        def share(micro_batch: Sequence[TrainingExample]) -> Share:
            ratio = _log_ratios(compute_losses, _documents(micro_batch, PreferencePair))  # (2 * pairs,), chosen first
            margin = beta * (ratio[::2] - ratio[1::2])  # (pairs,)
            losses = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)  # (pairs,)
            return Share(losses.sum() / len(examples), losses.detach(), margin.detach() > 0)

        return share


@dataclass(frozen=True)
class OrpoObjective:
    """The chosen answer's mean loss plus β times -log σ(log odds ratio) per pair, divided by the number of pairs.

    The odds are those of an answer's mean log-probability per token (arXiv:2403.07691, section 4.1). The first term
    covers the tokens of the answer only.
    """

    spec: Orpo

    def prepare_step(
        self, network: Network, examples: Sequence[TrainingExample], compute_losses: ComputeLosses
    ) -> ComputeShare:
        def share(micro_batch: Sequence[TrainingExample]) -> Share:
            documents = _documents(micro_batch, PreferencePair)
            losses = compute_losses(documents)
            mean = torch.stack([-part.mean() for part in _split_by_document(losses.nll, documents)])  # (2 * pairs,)
            chosen, rejected = mean[::2], mean[1::2]  # (pairs,) each
            ratio = _log_odds(chosen) - _log_odds(rejected)  # (pairs,)
            pair_losses = -chosen - self.spec.beta * F.logsigmoid(ratio)  # (pairs,)
            return Share(pair_losses.sum() / len(examples), pair_losses.detach(), ratio.detach() > 0)

        return share


@dataclass(frozen=True)
class KtoObjective:
    """w (1 - σ(± β (log ratio - baseline))) per example, divided by the number of examples.

    The baseline is the mean log ratio of mismatched rows, where each question of the step has the answer of the next
    one; at least 0, without a gradient. It is one number per step, computed before the first micro-batch.
    """

    spec: Kto

    def prepare_step(
        self, network: Network, examples: Sequence[TrainingExample], compute_losses: ComputeLosses
    ) -> ComputeShare:
        baseline = self._baseline(network, _documents(examples, LabeledRow))

        def share(micro_batch: Sequence[TrainingExample]) -> Share:
            ratio = _log_ratios(compute_losses, _documents(micro_batch, LabeledRow))  # (examples,)
            labels = [isinstance(example, LabeledRow) and example.desirable for example in micro_batch]
            sign = ratio.new_tensor([1.0 if desirable else -1.0 for desirable in labels])
            weight = ratio.new_tensor([self._weight(desirable) for desirable in labels])
            gain = self.spec.beta * sign * (ratio - baseline)  # (examples,)
            example_losses = weight * torch.sigmoid(-gain)  # (examples,)
            return Share(example_losses.sum() / len(examples), example_losses.detach(), gain.detach() > 0)

        return share

    def _weight(self, desirable: bool) -> float:
        return self.spec.desirable_weight if desirable else self.spec.undesirable_weight

    def _baseline(self, network: Network, answers: Sequence[TokenRow]) -> torch.Tensor:
        """() the baseline of a step with these answers."""
        if len(answers) < 2:
            return torch.zeros(())  # no other answer in the step
        mismatched = [
            _with_answer_of(row, other) for row, other in zip(answers, [*answers[1:], answers[0]], strict=True)
        ]
        return _log_ratios(network.evaluate, mismatched).mean().clamp(min=0)  # NaN stays NaN


def make_objective(spec: Objective) -> TrainingObjective:
    """The objective of the spec."""
    if isinstance(spec, Dpo):
        return DpoObjective(spec)
    if isinstance(spec, Orpo):
        return OrpoObjective(spec)
    return KtoObjective(spec) if isinstance(spec, Kto) else SupervisedObjective()


@torch.no_grad()
def evaluate(network: Network, objective: TrainingObjective, examples: Sequence[TrainingExample]) -> Evaluation:
    """The evaluation of all examples as one step, computed one example at a time.

    Raises:
        JobFailed: a single example does not fit into the device's memory; the message names it.
    """
    with network.evaluating():
        compute_share = objective.prepare_step(network, examples, network.evaluate)
        shares = [_single_share(compute_share, example, network.device) for example in examples]
    loss = math.fsum(float(share.total) for share in shares)
    hits = torch.cat([share.hits for share in shares])
    perplexity = math.exp(min(loss, 700.0)) if isinstance(objective, SupervisedObjective) else None
    return Evaluation(loss, float(hits.float().mean()), perplexity)


def _single_share(compute_share: ComputeShare, example: TrainingExample, device: torch.device) -> Share:
    """The share of one example; retried once after cached memory is released. Raises: JobFailed."""
    for _ in range(2):
        try:
            return compute_share([example])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the except block, because the error's traceback holds the tensors of the failed pass.
        release_memory(device)
    tokens = max(len(document.input_ids) for document in example.documents)
    raise JobFailed(
        f"the row of line {example.line} has {tokens} tokens, which do not fit into the device's memory even without "
        "gradients: lower training.max_seq_len_tokens below that, or use a smaller base model",
        reason=FailureReason.OUT_OF_MEMORY,
        line=example.line,
        tokens=tokens,
    )


def _documents(examples: Sequence[TrainingExample], kind: type[PreferencePair | LabeledRow]) -> list[TokenRow]:
    assert all(isinstance(example, kind) for example in examples)
    return [document for example in examples for document in example.documents]


def _split_by_document(values: torch.Tensor, documents: Sequence[TokenRow]) -> tuple[torch.Tensor, ...]:
    return values.split([document.trained_tokens for document in documents])


def _log_ratios(compute_losses: ComputeLosses, documents: Sequence[TokenRow]) -> torch.Tensor:
    """(documents,) log π - log π_ref of each one's trained tokens; π_ref is the base without the adapter.

    Subtracted token by token, because the two sums are large and nearly equal, and float32 would round the difference.
    """
    reference = compute_losses(documents, adapter=False).nll  # (trained tokens,); before the policy's activations exist
    ratios = reference - compute_losses(documents).nll  # (trained tokens,)
    return torch.stack([part.sum() for part in _split_by_document(ratios, documents)])


def _log_odds(log_probability: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of log p."""
    bounded = log_probability.clamp(max=MAX_LOG_PROBABILITY)
    return bounded - torch.log(-torch.expm1(bounded))


def _with_answer_of(row: TokenRow, other: TokenRow) -> TokenRow:
    """The question of `row` with the answer of `other`, cut at the length of the longer row.

    An answer is everything from its first trained token on, tool results between its messages included.
    """
    question_end, answer_start = (list(each.trained).index(True, 1) for each in (row, other))
    limit = max(len(row.input_ids), len(other.input_ids))
    ids = [*row.input_ids[:question_end], *other.input_ids[answer_start:]][:limit]
    trained = [*[False] * question_end, *other.trained[answer_start:]][:limit]
    return TokenRow(row.line, ids, trained)
