"""The training loop. It reads top to bottom."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from qlora_service.data.batching import pack
from qlora_service.errors import JobFailed
from qlora_service.jobs import FailureReason
from qlora_service.models.adapters import trainable
from qlora_service.specs import Training
from qlora_service.training.device import peak_memory_bytes, synchronize
from qlora_service.training.evaluation import mean_loss
from qlora_service.training.micro_batch import TokenRow, collate, loss_sum
from qlora_service.training.optimizer import learning_rate, make_optimizer

ROWS_NAMED = 20
"""Most lines a failure names."""


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step did. `step` counts from 1."""

    step: int
    loss: float
    """Nats per learned token, over the whole step."""
    learning_rate: float
    grad_norm: float
    """2-norm before clipping"""
    trained_tokens: int
    tokens: int
    tokens_per_second: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class EvaluationMetrics:
    """Held-out loss after `step` steps; step 0 is the untouched base."""

    step: int
    eval_loss: float
    peak_memory_bytes: int


class Observer(Protocol):
    """Who is told about every step and evaluation; may raise to stop the training."""

    def on_step(self, metrics: StepMetrics) -> None: ...

    def on_evaluation(self, metrics: EvaluationMetrics) -> None: ...


@dataclass(frozen=True)
class Losses:
    """Held-out loss before the first step and after the last."""

    before: float
    after: float


def train(
    model: torch.nn.Module,
    rows_of_step: Callable[[int], Sequence[TokenRow]],
    held_out: Sequence[TokenRow],
    *,
    total_steps: int,
    evaluate_every: int,
    training: Training,
    device: torch.device,
    observer: Observer,
    micro_batch_tokens: int,
) -> Losses:
    """Train the model's trainable parameters in place; `rows_of_step(i)` are the examples of step i (from 0).

    A step is a set of examples. However they are cut into micro-batches, its loss is the sum over its learned tokens
    divided by the number of its learned tokens, over the whole step.

    Raises:
        JobFailed: the loss or a gradient is not finite, or no gradient reaches the adapter.
    """
    parameters = trainable(model)
    optimizer = make_optimizer(parameters, training, device)
    model.train()

    def evaluate(step: int) -> float:
        loss = mean_loss(model, held_out, device)
        if not math.isfinite(loss):
            cause = "lower training.learning_rate" if step else "the base model itself gives it: try float32"
            raise JobFailed(
                f"the held-out loss after step {step} is {loss}: {cause}", reason=FailureReason.NOT_FINITE, step=step
            )
        observer.on_evaluation(EvaluationMetrics(step, loss, peak_memory_bytes(device)))
        return loss

    before = after = evaluate(0)
    for step in range(total_steps):
        started = time.perf_counter()
        rows = rows_of_step(step)
        trained_tokens = sum(row.trained_tokens for row in rows)
        # Dropout masks follow (seed, step), so an attempt that starts in the middle draws the same ones.
        torch.manual_seed(step_seed(training.seed, step))

        step_loss = 0.0
        for members in pack([len(row.input_ids) for row in rows], micro_batch_tokens):
            batch = collate([rows[index] for index in members], device)
            loss = loss_sum(model, batch) / trained_tokens
            loss.backward()
            step_loss += float(loss.detach())

        if step == 0:
            _check_every_parameter_learns(model)
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm))
        _check_finite(step_loss, grad_norm, step, rows)
        rate = learning_rate(step, total_steps, training)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        synchronize(device)
        tokens = sum(len(row.input_ids) for row in rows)
        observer.on_step(
            StepMetrics(
                step=step + 1,
                loss=step_loss,
                learning_rate=rate,
                grad_norm=grad_norm,
                trained_tokens=trained_tokens,
                tokens=tokens,
                tokens_per_second=tokens / (time.perf_counter() - started),
                peak_memory_bytes=peak_memory_bytes(device),
            )
        )
        if (step + 1) % evaluate_every == 0 or step + 1 == total_steps:
            after = evaluate(step + 1)
    return Losses(before, after)


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


def _check_finite(loss: float, grad_norm: float, step: int, rows: Sequence[TokenRow]) -> None:
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    lines = [row.line for row in rows[:ROWS_NAMED]]
    raise JobFailed(
        f"step {step + 1}: loss {loss}, gradient norm {grad_norm}. Lower training.learning_rate, or look at this "
        f"step's rows: lines {', '.join(map(str, lines))}",
        reason=FailureReason.NOT_FINITE,
        step=step + 1,
        lines=lines,
    )
