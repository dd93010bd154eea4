"""The training loop. `train` reads top to bottom."""

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
from qlora_service.models.adapters import allocation_state, prune_after_step, restore_allocation, trainable_parameters
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
    managed_optimizer,
    optimizer_state,
    restore_optimizer,
    set_learning_rate,
)
from qlora_service.training.step import StepGradients, example_tokens

MAX_NAMED_LINES = 20
"""Most lines of the dataset that an error names"""
MAX_CONSECUTIVE_SKIPS = 3
"""Skipped steps in a row that end the job"""
DIVERGENCE_RATIO = 1.5
"""Latest loss over the lowest recent loss above which the learning rate is blamed, not the rows of one step"""


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one optimizer step. `step` counts from 1."""

    step: int
    loss: float
    """Of the whole step: nats per trained token when supervised, else the objective's loss per example"""
    learning_rate: float
    grad_norm: float
    """2-norm before clipping"""
    skipped: bool
    """The loss or a gradient was not finite; the weights were left unchanged"""
    trained_tokens: int
    tokens: int
    tokens_per_second: float
    peak_memory_bytes: int


class Observer(Protocol):
    """Receives the metrics of every step and every evaluation; may raise to end the training."""

    def on_step(self, metrics: StepMetrics) -> None: ...

    def on_evaluation(self, metrics: EvaluationMetrics) -> None: ...


class Control(Protocol):
    """Decides whether training continues, and stores its states."""

    def check(self) -> None:
        """Raises to end the training.

        Called before every turn of the loop, every forward pass, and every layer in both directions: between two calls
        at most one micro-batch or one held-out document is computed. After an `Interrupted` the loop saves the state of
        the last completed step; after any other exception it saves nothing.
        """
        ...

    def checkpoint_is_due(self) -> bool:
        """Whether to save the state now; called after every step and every evaluation."""
        ...

    def save(self, state: TrainingState) -> None: ...

    def plan_changed(self, change: dict[str, Any]) -> None:
        """Receives what changed because memory ran out.

        Keys: `step` (from 1), `what` ("micro_batch_tokens" or "gradient_checkpointing"), `from`, `to`, and `why`.
        """
        ...

    def around_step(self, step: int, optimizer: torch.optim.Optimizer) -> AbstractContextManager[object]:
        """Context of the forward and backward passes and the update of step `step` (from 0)."""
        ...


class Unattended:
    """A control that never ends the training and stores no state."""

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
"""Signature of `Control.around_step`"""


@dataclass(frozen=True)
class Workload:
    """The examples of each step, the held-out examples, and the evaluation interval."""

    examples_of_step: Callable[[int], Sequence[TrainingExample]]
    """Maps a step (from 0) to its examples"""
    held_out: Sequence[TrainingExample]
    total_steps: int
    evaluate_every: int
    """Steps between two evaluations"""


@dataclass(frozen=True)
class Outcome:
    """Evaluations of the adapter before the first step and of the final adapter."""

    before: Evaluation
    after: Evaluation
    steps: int
    """Steps taken: fewer than planned after an early stop"""
    best_step: int
    """Steps after which the final adapter was evaluated"""
    skipped_steps: int


class LossNotFinite(JobFailed):
    """The loss or a gradient was not finite in `MAX_CONSECUTIVE_SKIPS` steps in a row."""

    outcome: Outcome | None = None
    """Outcome as of the last finite step; None without one"""


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
    """Trains the adapter in place.

    A step is one optimizer step over a set of examples. Its loss is the sum over its trained tokens (or pairs, or
    labeled answers) divided by their number in the whole step. How the step is cut into micro-batches therefore
    changes neither the loss nor its gradients, beyond rounding and the random draws of dropout and noise.

    With `start`, a state that `control` has saved, training resumes after the state's last step and, on the same
    machine, ends with the same bytes as an uninterrupted one. `network` has to hold the adapter as first attached;
    `row_losses` is overwritten with the losses in the state.

    Raises:
        Interrupted: raised by `control` or `observer`; the state of the last completed step was saved.
        LossNotFinite: the loss or a gradient was not finite three steps in a row; the adapter is that of the last
            finite step.
        JobFailed: the held-out loss is not finite, no gradient reaches the adapter, or the longest example of a step
            does not fit into memory.
    """
    model, device = network.model, network.device
    parameters = trainable_parameters(model)
    control = control or Unattended()
    total_steps, evaluate_every = workload.total_steps, workload.evaluate_every
    held_out = HeldOut(network, objective, workload.held_out, training, observer.on_evaluation)
    gradients = StepGradients(network, objective, training, control.plan_changed)
    history, rng_state = StepHistory(), random_state(device)
    model.train()

    with managed_optimizer(model, training, device) as optimizer, checks_every_layer(network, control.check):
        if start is not None:
            restore_trainable(model, start.parameters)
            restore_optimizer(optimizer, start.optimizer)
            restore_allocation(model, start.allocation)
            restore_random_state(start.random_state, device)
            row_losses.restore(start.row_losses)
            held_out.state, history, rng_state = start.held_out, start.history, start.random_state
            gradients.micro_batch_tokens = start.micro_batch_tokens
            if start.gradient_checkpointing and not network.checkpointing:
                network.checkpoint()

        def state_key() -> tuple[object, ...]:
            """Differs between any two states of this training."""
            return history.step, held_out.state.measured_step, gradients.micro_batch_tokens, network.checkpointing

        saved_key = None if start is None else state_key()

        def save() -> None:
            """Saves the state after the last completed step, unless it is saved already."""
            nonlocal saved_key
            if saved_key != state_key():
                control.save(
                    TrainingState(
                        history=history,
                        parameters=trainable_copies(model),
                        optimizer=optimizer_state(optimizer),
                        allocation={
                            name: value.to("cpu", copy=True) for name, value in allocation_state(model).items()
                        },
                        held_out=held_out.state,
                        row_losses=row_losses.state(),
                        random_state=rng_state,
                        micro_batch_tokens=gradients.micro_batch_tokens,
                        gradient_checkpointing=network.checkpointing,
                    )
                )
                saved_key = state_key()

        try:
            # Each turn is one evaluation or one step. A resumed training starts with the turn that was interrupted.
            while True:
                control.check()
                if control.checkpoint_is_due():
                    save()
                step = history.step  # completed steps, and the index of the next one
                # Checked at the start of a turn, so that a training resumed after the last skip fails too.
                if history.skipped_in_a_row == MAX_CONSECUTIVE_SKIPS:
                    rate = learning_rate(step - 1, total_steps, training)
                    raise _not_finite(history, workload.examples_of_step(step - 1), rate, held_out)

                # Evaluate before the first step, at every interval, and after the last step.
                if held_out.state.measured_step != step and (step % evaluate_every == 0 or step == total_steps):
                    held_out.measure(step)
                    continue
                if held_out.patience_is_exhausted or step == total_steps:
                    break

                started = time.perf_counter()
                examples = workload.examples_of_step(step)
                with control.around_step(step, optimizer):
                    # Gradients of the whole step, accumulated over its micro-batches.
                    loss = gradients.compute(step, examples)
                    if step == 0:
                        _check_gradients_reach_adapter(model)
                    grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm))
                    rate = learning_rate(step, total_steps, training)
                    set_learning_rate(optimizer, rate)
                    is_finite = math.isfinite(loss.total) and math.isfinite(grad_norm)
                    # Nothing interrupts from here until `on_step`: a step is completed as a whole or not at all.
                    # A step that is not finite changes neither weights nor optimizer.
                    if is_finite:
                        optimizer.step()
                    prune_after_step(model, step + 1, skipped=not is_finite)
                    optimizer.zero_grad(set_to_none=True)
                row_losses.record(step + 1, loss.lines, loss.example_losses)
                history = history.after(loss.total, grad_norm, skipped=not is_finite)
                rng_state = random_state(device)  # of the completed step: an interrupted one draws numbers too

                synchronize(device)  # so that the duration includes the GPU's queued work
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
            # Gradients of an unfinished step are dropped: the state is that of the last completed one.
            optimizer.zero_grad(set_to_none=True)
            save()
            raise
        after = held_out.restore_chosen()
        return Outcome(held_out.before, after, history.step, held_out.state.chosen_step, history.skipped_steps)


@contextmanager
def checks_every_layer(network: Network, check: Callable[[], None]) -> Iterator[None]:
    """Inside, `check` is called before every forward pass, and before each layer of it and of its backward pass.

    Every forward pass begins with the input embeddings, whatever code starts it; one pass may take long.
    """
    hook = network.model.get_input_embeddings().register_forward_pre_hook(lambda *_: check())
    try:
        with network.before_each_layer(check):
            yield
    finally:
        hook.remove()


def _check_gradients_reach_adapter(model: torch.nn.Module) -> None:
    """Raises: JobFailed, naming adapter weights that have no gradient after the first step's backward pass."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    if not any(gradient is not None and gradient.any() for gradient in gradients.values()):
        raise JobFailed("no gradient reaches the adapter", reason=FailureReason.INTERNAL, step=1)
    without_gradient = [name for name, gradient in gradients.items() if gradient is None]
    if without_gradient:
        raise JobFailed(
            f"no gradient reaches {len(without_gradient)} adapter weights, such as {without_gradient[0]}: leave "
            "modules that take no part in the forward pass out of adapter.target_modules",
            reason=FailureReason.INVALID_INPUT,
            step=1,
        )


def _not_finite(
    history: StepHistory, examples: Sequence[TrainingExample], rate: float, held_out: HeldOut
) -> LossNotFinite:
    """The failure, with its likely cause: a learning rate that made the loss diverge, or else the last step's rows."""
    step, recent = history.step, history.recent_losses
    lines = [example.line for example in examples[:MAX_NAMED_LINES]]
    symptom = (
        f"step {step}, and the {MAX_CONSECUTIVE_SKIPS - 1} before it, were not finite: loss {history.loss}, gradient "
        f"norm {history.grad_norm}."
    )
    if recent and recent[-1] > DIVERGENCE_RATIO * min(recent):
        advice = (
            f"The loss had risen from {min(recent):.3f} to {recent[-1]:.3f}: the learning rate of {rate:.2g} makes it "
            "diverge. Lower training.learning_rate"
        )
    else:
        listed = ", ".join(map(str, lines))
        advice = f"Lower training.learning_rate, or check this step's rows: lines {listed}"
    failure = LossNotFinite(f"{symptom} {advice}", reason=FailureReason.NOT_FINITE, step=step, lines=lines)
    # If the held-out loss is not finite either, there is no adapter worth keeping.
    with suppress(JobFailed):
        if recent:
            finite_step = step - MAX_CONSECUTIVE_SKIPS
            after = held_out.measure(finite_step)
            failure.outcome = Outcome(held_out.before, after, finite_step, finite_step, history.skipped_steps)
    return failure
