"""The training loop. It reads top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from qlora_service.domain.jobs import FailureReason
from qlora_service.errors import Interrupted, JobFailed
from qlora_service.models.adapters import after_step, allocation_state, restore_allocation, trainable
from qlora_service.specs import Training
from qlora_service.training.checkpoint.state import StepHistory, TrainingState, random_state, restore_random_state
from qlora_service.training.device import peak_memory_bytes, synchronize
from qlora_service.training.evaluation.held_out import EvaluationMetrics, HeldOut, restore_trainable, trainable_copies
from qlora_service.training.evaluation.row_losses import RowLosses
from qlora_service.training.network.micro_batch import TrainingExample
from qlora_service.training.network.network import Network
from qlora_service.training.objectives import Evaluation, TrainingObjective
from qlora_service.training.optimizer import (
    learning_rate,
    optimizer_state,
    optimizing,
    restore_optimizer,
    set_learning_rate,
)
from qlora_service.training.step import StepGradients, example_tokens

ROWS_NAMED = 20
"""Most lines a failure names."""
SKIPS_IN_A_ROW = 3
"""Steps that may fail one after the other; the last of so many ends the job."""
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


class Observer(Protocol):
    """Who is told about every step and evaluation; may raise to stop the training."""

    def on_step(self, metrics: StepMetrics) -> None: ...

    def on_evaluation(self, metrics: EvaluationMetrics) -> None: ...


class Control(Protocol):
    """Who decides whether the training goes on, and keeps its states."""

    def check(self) -> None:
        """Raises what ends the training.

        Asked before every turn of the loop and every forward pass, so that one micro-batch or one held-out document
        at most runs in between. After an `Interrupted`, the state of the last completed step is saved; after any other
        exception nothing is.
        """
        ...

    def checkpoint_is_due(self) -> bool:
        """Asked after every step and every evaluation."""
        ...

    def save(self, state: TrainingState) -> None: ...

    def plan_changed(self, change: dict[str, Any]) -> None:
        """Told that memory ran out: `step` (from 1), `what` ("micro_batch_tokens" or "gradient_checkpointing"), `from`,
        `to`, and `why`.
        """
        ...

    def around_step(self, step: int, optimizer: torch.optim.Optimizer) -> AbstractContextManager[object]:
        """Entered around the passes and the update of step `step` (from 0)."""
        ...


class Unattended:
    """A control that never stops the training and keeps nothing."""

    def check(self) -> None:
        pass

    def checkpoint_is_due(self) -> bool:
        return False

    def save(self, state: TrainingState) -> None:
        pass

    def plan_changed(self, change: dict[str, Any]) -> None:
        pass

    def around_step(self, step: int, optimizer: torch.optim.Optimizer) -> AbstractContextManager[object]:
        return nullcontext()


AroundStep = Callable[[int, torch.optim.Optimizer], AbstractContextManager[object]]
"""As `Control.around_step`"""


@dataclass(frozen=True)
class Workload:
    """The examples of each step, and when the adapter is evaluated."""

    examples_of_step: Callable[[int], Sequence[TrainingExample]]
    """Of step i (from 0)"""
    held_out: Sequence[TrainingExample]
    total_steps: int
    evaluate_every: int
    """Steps between evaluations"""


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
    workload: Workload,
    training: Training,
    observer: Observer,
    row_losses: RowLosses,
    *,
    start: TrainingState | None = None,
    control: Control | None = None,
) -> Outcome:
    """Train the adapter in place.

    A step is a set of examples. However they are cut into micro-batches, its loss is the sum over its learned tokens
    (or pairs, or examples) divided by their number in the whole step.

    From `start`, a state that `control` was given, training goes on as if it had never stopped: on one machine to the
    same bytes. `network` has to hold the adapter as it was first attached; `row_losses` become those of the state.

    Raises:
        Interrupted: `control` or `observer` asked for it; the state of the last completed step was saved.
        LossNotFinite: a step's loss or gradient was not finite three times in a row; the adapter is as the last
            finite step left it.
        JobFailed: the held-out loss is not finite, no gradient reaches the adapter, or memory does not hold the step's
            longest example.
    """
    model, device = network.model, network.device
    parameters = trainable(model)
    control = control or Unattended()
    total_steps, evaluate_every = workload.total_steps, workload.evaluate_every
    held = HeldOut(network, objective, workload.held_out, training, observer.on_evaluation)
    gradients = StepGradients(network, objective, training, control.plan_changed)
    history, chance = StepHistory(), random_state(device)
    model.train()

    with optimizing(model, training, device) as optimizer, checking(network, control.check):
        if start is not None:
            restore_trainable(model, start.parameters)
            restore_optimizer(optimizer, start.optimizer)
            restore_allocation(model, start.allocation)
            restore_random_state(start.random_state, device)
            row_losses.restore(start.row_losses)
            held.state, history, chance = start.held_out, start.history, start.random_state
            gradients.micro_batch_tokens = start.micro_batch_tokens
            if start.gradient_checkpointing and not network.checkpointing:
                network.checkpoint()

        def position() -> tuple[object, ...]:
            """What tells two states of this training apart."""
            return history.step, held.state.measured_step, gradients.micro_batch_tokens, network.checkpointing

        saved = None if start is None else position()

        def save() -> None:
            """Hand over the state after the last completed step, unless it is the one that was handed over last."""
            nonlocal saved
            if saved != position():
                control.save(
                    TrainingState(
                        history=history,
                        parameters=trainable_copies(model),
                        optimizer=optimizer_state(optimizer),
                        allocation={
                            name: value.to("cpu", copy=True) for name, value in allocation_state(model).items()
                        },
                        held_out=held.state,
                        row_losses=row_losses.state(),
                        random_state=chance,
                        micro_batch_tokens=gradients.micro_batch_tokens,
                        gradient_checkpointing=network.checkpointing,
                    )
                )
                saved = position()

        try:
            # A turn is an evaluation or a step. A training that goes on begins with the turn it was interrupted in.
            while True:
                control.check()
                if control.checkpoint_is_due():
                    save()
                step = history.step
                if history.skipped_in_a_row == SKIPS_IN_A_ROW:
                    rate = learning_rate(step - 1, total_steps, training)
                    raise _not_finite(history, workload.examples_of_step(step - 1), rate, held)
                if held.state.measured_step != step and (step % evaluate_every == 0 or step == total_steps):
                    held.measure(step)
                    continue
                if held.is_enough or step == total_steps:
                    break

                started = time.perf_counter()
                examples = workload.examples_of_step(step)
                with control.around_step(step, optimizer):
                    loss = gradients.compute(step, examples)
                    if step == 0:
                        _check_every_parameter_learns(model)
                    grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm))
                    rate = learning_rate(step, total_steps, training)
                    set_learning_rate(optimizer, rate)
                    is_finite = math.isfinite(loss.total) and math.isfinite(grad_norm)
                    # From here to the observer nothing asks whether to stop: a step is completed whole, or not at all.
                    if is_finite:
                        optimizer.step()
                    after_step(model, step + 1, skipped=not is_finite)
                    optimizer.zero_grad(set_to_none=True)
                row_losses.record(step + 1, loss.lines, loss.of_example)
                history = history.after(loss.total, grad_norm, skipped=not is_finite)
                chance = random_state(device)

                synchronize(device)
                tokens = sum(example_tokens(examples))
                documents = [document for example in examples for document in example.documents]
                observer.on_step(
                    StepMetrics(
                        step=step + 1,
                        loss=loss.total,
                        learning_rate=rate,
                        grad_norm=grad_norm,
                        skipped=not is_finite,
                        trained_tokens=sum(document.trained_tokens for document in documents),
                        tokens=tokens,
                        tokens_per_second=tokens / (time.perf_counter() - started),
                        peak_memory_bytes=peak_memory_bytes(device),
                    )
                )
            save()
        except Interrupted:
            optimizer.zero_grad(set_to_none=True)
            save()
            raise
        after = held.choose()
        return Outcome(held.before, after, history.step, held.state.chosen_step, history.skipped_steps)


@contextmanager
def checking(network: Network, check: Callable[[], None]) -> Iterator[None]:
    """Call `check` before every forward pass, whoever makes it (all of them begin with the embeddings), and before each
    layer of it and of its backward pass, which may take long.
    """
    hook = network.model.get_input_embeddings().register_forward_pre_hook(lambda *_: check())
    try:
        with network.before_each_layer(check):
            yield
    finally:
        hook.remove()


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


def _not_finite(history: StepHistory, examples: Sequence[TrainingExample], rate: float, held: HeldOut) -> LossNotFinite:
    """Why training ends: a learning rate that drove the loss up, or else the last step's rows."""
    step, recent = history.step, history.recent_losses
    lines = [example.line for example in examples[:ROWS_NAMED]]
    what = (
        f"step {step}, and the {SKIPS_IN_A_ROW - 1} before it: loss {history.loss}, gradient norm {history.grad_norm}."
    )
    if recent and recent[-1] > BLOWN_UP * min(recent):
        why = (
            f"The loss had risen from {min(recent):.3f} to {recent[-1]:.3f}: the learning rate of {rate:.2g} makes it "
            "blow up. Lower training.learning_rate"
        )
    else:
        named = ", ".join(map(str, lines))
        why = f"Lower training.learning_rate, or look at this step's rows: lines {named}"
    failure = LossNotFinite(f"{what} {why}", reason=FailureReason.NOT_FINITE, step=step, lines=lines)
    # Where the held-out loss is not finite either, nothing is left to keep.
    with suppress(JobFailed):
        if recent:
            finite_step = step - SKIPS_IN_A_ROW
            after = held.measure(finite_step)
            failure.outcome = Outcome(held.before, after, finite_step, finite_step, history.skipped_steps)
    return failure
