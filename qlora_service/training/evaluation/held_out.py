"""Evaluations of the held-out examples during training, and the adapter with the lowest held-out loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from qlora_service.domain.jobs import FailureReason
from qlora_service.errors import JobFailed
from qlora_service.specs import Training
from qlora_service.training.device import peak_memory_bytes
from qlora_service.training.network.micro_batch import TrainingExample
from qlora_service.training.network.network import Network
from qlora_service.training.objectives import Evaluation, TrainingObjective, evaluate


@dataclass(frozen=True)
class EvaluationMetrics:
    """Metrics of the held-out examples after `step` steps; step 0 is the adapter as initialized."""

    step: int
    eval_loss: float
    eval_accuracy: float
    """See `objectives.Evaluation`"""
    eval_perplexity: float | None
    peak_memory_bytes: int


@dataclass(frozen=True)
class HeldOutState:
    """Summary of the evaluations so far."""

    before: Evaluation | None = None
    """Of the adapter as initialized"""
    best: Evaluation | None = None
    """The evaluation with the lowest loss"""
    chosen: Evaluation | None = None
    """Of the adapter that would be published now"""
    chosen_step: int = 0
    without_gain: int = 0
    """Evaluations since the best one"""
    measured_step: int | None = None
    """Steps completed at the last evaluation"""
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """By name, on the CPU; empty without `load_best_model_at_end`"""


class HeldOut:
    """Evaluates the held-out examples, and keeps the best adapter."""

    def __init__(
        self,
        network: Network,
        objective: TrainingObjective,
        examples: Sequence[TrainingExample],
        training: Training,
        on_evaluation: Callable[[EvaluationMetrics], None],
    ) -> None:
        self._network, self._objective, self._examples = network, objective, examples
        self._on_evaluation = on_evaluation
        self._patience = training.early_stopping_patience
        self._keeps_best = training.load_best_model_at_end
        self.state = HeldOutState()

    def measure(self, step: int) -> Evaluation:
        """The evaluation after `step` steps.

        Raises:
            JobFailed: its loss is not finite.
        """
        result = evaluate(self._network, self._objective, self._examples)
        if not math.isfinite(result.loss):
            base_remedy = "the base model itself gives it: set quantization.compute_dtype to float32"
            remedy = "lower training.learning_rate" if step else base_remedy
            raise JobFailed(
                f"the held-out loss after step {step} is {result.loss}: {remedy}",
                reason=FailureReason.NOT_FINITE,
                step=step,
            )
        self.state = self._after(step, result)
        # Called last, because it may raise to end the training, and the saved state has to include this evaluation.
        self._on_evaluation(
            EvaluationMetrics(
                step, result.loss, result.accuracy, result.perplexity, peak_memory_bytes(self._network.device)
            )
        )
        return result

    @property
    def patience_is_exhausted(self) -> bool:
        """Whether the loss has not improved for `early_stopping_patience` evaluations."""
        return self._patience is not None and self.state.without_gain >= self._patience

    @property
    def before(self) -> Evaluation:
        """The evaluation before the first step; requires that it was made."""
        assert self.state.before is not None
        return self.state.before

    def restore_chosen(self) -> Evaluation:
        """Gives the model the weights of the adapter to publish; the evaluation of that adapter."""
        assert self.state.chosen is not None
        restore_trainable(self._network.model, self.state.best_weights)
        return self.state.chosen

    def _after(self, step: int, result: Evaluation) -> HeldOutState:
        """The state with one more evaluation."""
        state = replace(self.state, measured_step=step, before=self.state.before or result)
        is_better = state.best is None or result.loss < state.best.loss
        if is_better or not self._keeps_best:
            state = replace(state, chosen=result, chosen_step=step)
        if not is_better:
            return replace(state, without_gain=state.without_gain + 1)
        if self._keeps_best:
            state = replace(state, best_weights=trainable_copies(self._network.model))
        return replace(state, best=result, without_gain=0)


def trainable_copies(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trainable parameters by name, copied to the CPU."""
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def restore_trainable(model: torch.nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """Sets the parameters named in `saved` to their saved values, in place."""
    parameters = dict(model.named_parameters())
    for name, value in saved.items():
        parameters[name].copy_(value)
