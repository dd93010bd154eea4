"""The training loop. It reads top to bottom."""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch

from qlora_service.data.batching import pack
from qlora_service.errors import JobFailed
from qlora_service.jobs import FailureReason
from qlora_service.models.adapters import after_step, regularization, trainable
from qlora_service.specs import Training
from qlora_service.training.device import peak_memory_bytes, synchronize
from qlora_service.training.micro_batch import TrainingExample
from qlora_service.training.network import Network
from qlora_service.training.objectives import Evaluation, TrainingObjective, evaluate
from qlora_service.training.optimizer import learning_rate, optimizing, set_learning_rate
from qlora_service.training.row_losses import RowLosses

ROWS_NAMED = 20
"""Most lines a failure names."""
SKIPS_IN_A_ROW = 3
"""Steps that may fail one after the other; the last of so many ends the job."""
REMEMBERED_LOSSES = 20
BLOWN_UP = 1.5
"""A loss so many times the lowest of the last ones was on its way up, not struck by one row."""


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step did. `step` counts from 1."""

    step: int
    loss: float
    """Of the whole step: nats per learned token when supervised, else the objective's per example"""
    learning_rate: float
    grad_norm: float
    """2-norm before clipping"""
    skipped: bool
    """The loss or a gradient was not finite, so the weights were left as they were"""
    trained_tokens: int
    tokens: int
    tokens_per_second: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class EvaluationMetrics:
    """The held-out examples after `step` steps; step 0 is the adapter as it starts."""

    step: int
    eval_loss: float
    eval_accuracy: float
    """See `objectives.Evaluation`"""
    eval_perplexity: float | None
    peak_memory_bytes: int


class Observer(Protocol):
    """Who is told about every step and evaluation; may raise to stop the training."""

    def on_step(self, metrics: StepMetrics) -> None: ...

    def on_evaluation(self, metrics: EvaluationMetrics) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """The held-out examples before the first step and for the adapter that training ends with."""

    before: Evaluation
    after: Evaluation
    steps: int
    """Steps that were taken: fewer than planned after an early stop"""
    best_step: int
    """The step that the adapter is of"""
    skipped_steps: int


class LossNotFinite(JobFailed):
    """The loss or a gradient was not finite `SKIPS_IN_A_ROW` times; `outcome` is of the last step that was."""

    outcome: Outcome | None = None


def train(  # noqa: PLR0915 - the loop reads top to bottom
    network: Network,
    objective: TrainingObjective,
    examples_of_step: Callable[[int], Sequence[TrainingExample]],
    held_out: Sequence[TrainingExample],
    *,
    total_steps: int,
    evaluate_every: int,
    training: Training,
    observer: Observer,
    row_losses: RowLosses,
) -> Outcome:
    """Train the adapter in place; `examples_of_step(i)` are the examples of step i (from 0).

    A step is a set of examples. However they are cut into micro-batches, its loss is the sum over its learned tokens
    (or pairs, or examples) divided by their number in the whole step.

    Raises:
        LossNotFinite: a step's loss or gradient was not finite three times in a row; the adapter is as the last
            finite step left it.
        JobFailed: the held-out loss is not finite, or no gradient reaches the adapter.
    """
    model, device = network.model, network.device
    parameters = trainable(model)
    held = HeldOut(network, objective, held_out, training, observer)
    recent: deque[float] = deque(maxlen=REMEMBERED_LOSSES)
    skipped_steps = skipped_in_a_row = 0
    model.train()

    with optimizing(model, training, device) as optimizer:
        before = held.measure(0)
        for step in range(total_steps):
            started = time.perf_counter()
            examples = examples_of_step(step)
            # Dropout masks follow (seed, step), so an attempt that starts in the middle draws the same ones.
            torch.manual_seed(step_seed(training.seed, step))

            share_of = objective.of_step(network, examples, network.losses)
            shares, order = [], []
            lengths = [sum(len(document.input_ids) for document in example.documents) for example in examples]
            for members in pack(lengths, training.micro_batch_tokens):
                share = share_of([examples[index] for index in members])
                share.total.backward()
                shares.append((share.total.detach(), share.each))
                order += members
            if (penalty := regularization(model)) is not None:
                penalty.backward()

            if step == 0:
                _check_every_parameter_learns(model)
            loss = math.fsum(float(total) for total, _ in shares)
            grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm))
            rate = learning_rate(step, total_steps, training)
            set_learning_rate(optimizer, rate)
            is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
            if is_finite:
                optimizer.step()
                after_step(model, step + 1)
                recent.append(loss)
                skipped_in_a_row = 0
            else:
                skipped_steps += 1
                skipped_in_a_row += 1
            optimizer.zero_grad(set_to_none=True)

            synchronize(device)
            documents = [document for example in examples for document in example.documents]
            observer.on_step(
                StepMetrics(
                    step=step + 1,
                    loss=loss,
                    learning_rate=rate,
                    grad_norm=grad_norm,
                    skipped=not is_finite,
                    trained_tokens=sum(document.trained_tokens for document in documents),
                    tokens=sum(lengths),
                    tokens_per_second=sum(lengths) / (time.perf_counter() - started),
                    peak_memory_bytes=peak_memory_bytes(device),
                )
            )
            of_example = torch.cat([each for _, each in shares]).tolist()
            row_losses.record(step + 1, [examples[index].line for index in order], of_example)
            if skipped_in_a_row == SKIPS_IN_A_ROW:
                failure = _not_finite(loss, grad_norm, step, examples, recent, rate)
                # Where the held-out loss is not finite either, nothing is left to keep.
                with suppress(JobFailed):
                    if recent:
                        finite_step = step + 1 - SKIPS_IN_A_ROW
                        after = held.measure(finite_step)
                        failure.outcome = Outcome(before, after, finite_step, finite_step, skipped_steps)
                raise failure
            is_last = step + 1 == total_steps
            if is_last or (step + 1) % evaluate_every == 0:
                held.measure(step + 1)
                if held.is_enough:
                    break
        return Outcome(before, held.choose(), step + 1, held.chosen_step, skipped_steps)


class HeldOut:
    """Measures the held-out examples, and remembers which adapter was the best."""

    def __init__(
        self,
        network: Network,
        objective: TrainingObjective,
        examples: Sequence[TrainingExample],
        training: Training,
        observer: Observer,
    ) -> None:
        self._network, self._objective, self._examples = network, objective, examples
        self._observer = observer
        self._patience = training.early_stopping_patience
        self._keeps_best = training.load_best_model_at_end
        self._best: Evaluation | None = None
        self._best_weights: list[torch.Tensor] = []
        self._without_gain = 0
        self.chosen_step = 0

    def measure(self, step: int) -> Evaluation:
        """The evaluation after `step` steps.

        Raises:
            JobFailed: its loss is not finite.
        """
        result = evaluate(self._network, self._objective, self._examples)
        if not math.isfinite(result.loss):
            cause = "lower training.learning_rate" if step else "the base model itself gives it: try float32"
            raise JobFailed(
                f"the held-out loss after step {step} is {result.loss}: {cause}",
                reason=FailureReason.NOT_FINITE,
                step=step,
            )
        self._observer.on_evaluation(
            EvaluationMetrics(
                step, result.loss, result.accuracy, result.perplexity, peak_memory_bytes(self._network.device)
            )
        )
        is_better = self._best is None or result.loss < self._best.loss
        self._without_gain = 0 if is_better else self._without_gain + 1
        if is_better or not self._keeps_best:
            self._chosen, self.chosen_step = result, step
        if is_better:
            self._best = result
            if self._keeps_best:
                self._best_weights = [weight.detach().cpu().clone() for weight in trainable(self._network.model)]
        return result

    @property
    def is_enough(self) -> bool:
        """Whether the loss has not fallen for as many evaluations as the patience allows."""
        return self._patience is not None and self._without_gain >= self._patience

    @torch.no_grad()
    def choose(self) -> Evaluation:
        """The evaluation of the adapter to publish, which the model holds from now on."""
        for weight, best in zip(trainable(self._network.model), self._best_weights, strict=False):
            weight.copy_(best)
        return self._chosen


def step_seed(seed: int, step: int) -> int:
    """The random generator's seed for one step."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:8], "big") >> 1


def _check_every_parameter_learns(model: torch.nn.Module) -> None:
    """Raises: JobFailed, naming adapter weights that the backward pass of the first step did not reach."""
    learned = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    if not any(gradient is not None and gradient.any() for gradient in learned.values()):
        raise JobFailed("no gradient reaches the adapter", reason=FailureReason.INTERNAL, step=1)
    cut_off = [name for name, gradient in learned.items() if gradient is None]
    if cut_off:
        raise JobFailed(
            f"no gradient reaches {len(cut_off)} adapter weights, such as {cut_off[0]}: leave modules that take no "
            "part in the forward pass out of adapter.target_modules",
            reason=FailureReason.INVALID_INPUT,
            step=1,
        )


def _not_finite(
    loss: float,
    grad_norm: float,
    step: int,
    examples: Sequence[TrainingExample],
    recent: Sequence[float],
    rate: float,
) -> LossNotFinite:
    """Why training ends: a learning rate that drove the loss up, or else this step's rows."""
    lines = [example.line for example in examples[:ROWS_NAMED]]
    what = f"step {step + 1}, and the {SKIPS_IN_A_ROW - 1} before it: loss {loss}, gradient norm {grad_norm}."
    if recent and recent[-1] > BLOWN_UP * min(recent):
        why = (
            f"The loss had risen from {min(recent):.3f} to {recent[-1]:.3f}: the learning rate of {rate:.2g} makes it "
            "blow up. Lower training.learning_rate"
        )
    else:
        named = ", ".join(map(str, lines))
        why = f"Lower training.learning_rate, or look at this step's rows: lines {named}"
    return LossNotFinite(f"{what} {why}", reason=FailureReason.NOT_FINITE, step=step + 1, lines=lines)
