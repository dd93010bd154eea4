"""Steps that are not finite, and the adapter that training ends with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from qlora_service.domain.jobs import FailureReason
from qlora_service.errors import JobFailed
from qlora_service.models.adapters import trainable_parameters
from qlora_service.specs import Training
from qlora_service.training.loop import Outcome, StepMetrics
from qlora_service.training.network.micro_batch import TokenRow
from qlora_service.training.optimizer import make_optimizer, optimizer_state
from tests.tiny_training import TRAINING, Recorder, load, network, rows, run, weights


def poisoning(model: PeftModel, steps: set[int], value: float = float("nan")) -> Recorder:
    """An observer that keeps the weights of each step; gradients of the given steps (from 1) are `value`."""

    class WeightRecorder(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.weights = [weights(model)]

        def on_step(self, metrics: StepMetrics) -> None:
            super().on_step(metrics)
            self.weights.append(weights(model))

    recorder = WeightRecorder()

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, value) if len(recorder.steps) + 1 in steps else gradient

    trainable_parameters(model)[3].register_hook(poison)
    return recorder


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_and_counted(tiny_model: Path, value: float) -> None:
    model = load(tiny_model)
    recorder: Any = poisoning(model, {2, 3, 5}, value)
    outcome, _ = run(model, rows(24), TRAINING, steps=6, recorder=recorder)
    assert [step.skipped for step in recorder.steps] == [False, True, True, False, True, False]
    assert outcome.skipped_steps == 3
    unchanged = [
        are_equal(after, before) for before, after in zip(recorder.weights, recorder.weights[1:], strict=False)
    ]
    assert unchanged == [False, True, True, False, True, False]


@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_32bit"])
def test_a_skipped_step_leaves_the_optimizer_as_it_was(
    tiny_model: Path, optim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a constant rate, a training with a skipped step equals one without that step."""
    training = TRAINING.model_copy(update={"optim": optim})
    optimizers = []

    def recording(*arguments: Any) -> torch.optim.Optimizer:
        optimizers.append(make_optimizer(*arguments))
        return optimizers[-1]

    monkeypatch.setattr("qlora_service.training.optimizer.make_optimizer", recording)
    monkeypatch.setattr("qlora_service.training.optimizer.release_optimizer", lambda optimizer: None)
    skipping, plain = load(tiny_model), load(tiny_model)
    train_rows = rows(24)
    run(skipping, train_rows, training, steps=3, recorder=poisoning(skipping, {2}))
    run(plain, train_rows[:8] + train_rows[16:], training, steps=2)
    assert are_equal(weights(skipping), weights(plain))
    one, other = (optimizer_state(optimizer) for optimizer in optimizers)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name][key]) for name, state in one.items() for key, value in state.items())


def failure_of(tiny_model: Path, prepare: Callable[[PeftModel], Recorder], training: Training = TRAINING) -> JobFailed:
    model = load(tiny_model)
    with pytest.raises(JobFailed) as failure:
        run(model, rows(40), training, steps=8, recorder=prepare(model))
    assert all(weight.isfinite().all() for weight in weights(model).values())
    return failure.value


def test_three_skipped_steps_in_a_row_fail_the_job_with_step_and_lines(tiny_model: Path) -> None:
    failure = failure_of(tiny_model, lambda model: poisoning(model, {1, 3, 4, 5}))
    assert failure.details["reason"] == FailureReason.NOT_FINITE
    assert failure.details["step"] == 5
    assert failure.details["lines"] == [row.line for row in rows(40)[32:40]]
    assert failure.message.startswith("step 5, and the 2 before it")
    assert "lines 33, 34" in failure.message


def test_a_failed_job_keeps_the_adapter_of_its_last_finite_step(tiny_model: Path) -> None:
    model = load(tiny_model)
    recorder: Any = poisoning(model, {3, 4, 5})
    with pytest.raises(JobFailed) as failure:
        run(model, rows(40), TRAINING, steps=8, recorder=recorder)
    assert are_equal(weights(model), recorder.weights[2])
    outcome: Outcome | None = getattr(failure.value, "outcome", None)
    assert outcome is not None
    assert (outcome.steps, outcome.best_step, outcome.skipped_steps) == (2, 2, 3)
    measured = network(model).evaluate(rows(4, seed=99)).nll.mean()
    assert outcome.after.loss == pytest.approx(float(measured), rel=1e-6)


def test_a_job_without_a_finite_step_has_no_outcome(tiny_model: Path) -> None:
    failure = failure_of(tiny_model, lambda model: poisoning(model, {1, 2, 3}))
    assert failure.details["step"] == 3
    assert getattr(failure, "outcome", None) is None


def test_a_learning_rate_that_made_the_loss_diverge_is_named(tiny_model: Path) -> None:
    """As with a rate that is too high: the loss rises again, then it is not finite."""
    training = TRAINING.model_copy(update={"learning_rate": 0.05})

    def prepare(model: PeftModel, overshoots: bool) -> Recorder:
        model.get_input_embeddings().weight.data *= 20  # tied to the head: the first losses are very high
        recorder = poisoning(model, {6, 7, 8})
        on_step = recorder.on_step

        def overshooting(metrics: StepMetrics) -> None:
            on_step(metrics)
            if overshoots and metrics.step == 4:
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.data.zero_()

        recorder.on_step = overshooting  # type: ignore[method-assign]
        return recorder

    failure = failure_of(tiny_model, lambda model: prepare(model, True), training)
    assert "learning rate of 0.05 makes it diverge" in failure.message
    assert "Lower training.learning_rate" in failure.message
    steady = failure_of(tiny_model, lambda model: prepare(model, False), training)
    assert "diverge" not in steady.message


def test_a_loss_that_is_not_finite_is_skipped_too(tiny_model: Path) -> None:
    """The embedding of one token in the second step overflows."""
    model, overflowing = load(tiny_model), 501
    train_rows = rows(24)
    train_rows[10] = TokenRow(11, [overflowing, *train_rows[10].input_ids], [False, *train_rows[10].trained])
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output * float("inf") if overflowing in inputs[0] else output
    )
    outcome, recorder = run(model, train_rows, TRAINING, steps=3)
    assert [step.skipped for step in recorder.steps] == [False, True, False]
    assert recorder.steps[1].loss != recorder.steps[1].loss
    assert outcome.skipped_steps == 1


def test_a_held_out_loss_that_is_not_finite_fails_the_job(tiny_model: Path) -> None:
    model = load(tiny_model)

    class Overwriting(Recorder):
        def on_step(self, metrics: StepMetrics) -> None:
            trainable_parameters(model)[0].data.fill_(float("inf"))

    with pytest.raises(JobFailed, match="held-out loss after step 1") as failure:
        run(model, rows(24), TRAINING, steps=1, recorder=Overwriting())
    assert failure.value.details["reason"] == FailureReason.NOT_FINITE


# --- the adapter that training ends with


def test_training_stops_when_the_held_out_loss_stops_improving(tiny_model: Path) -> None:
    """With unrelated held-out rows and a high rate, their loss rises from some step on."""
    training = TRAINING.model_copy(update={"learning_rate": 0.05, "early_stopping_patience": 2})
    outcome, recorder = run(load(tiny_model), rows(8), training, steps=40, evaluate_every=1)
    losses = [evaluation.eval_loss for evaluation in recorder.evaluations]
    assert outcome.steps < 40
    assert len(recorder.steps) == outcome.steps
    best = losses.index(min(losses))
    assert len(losses) - 1 - best == 2
    assert min(losses[-2:]) >= losses[best]
    assert (outcome.best_step, outcome.after.loss) == (outcome.steps, losses[-1])


@pytest.mark.parametrize("patience", [None, 3])
def test_the_best_adapter_is_kept_exactly(tiny_model: Path, patience: int | None) -> None:
    training = TRAINING.model_copy(
        update={"learning_rate": 0.05, "load_best_model_at_end": True, "early_stopping_patience": patience}
    )
    model = load(tiny_model)
    recorder: Any = poisoning(model, set())
    outcome, _ = run(model, rows(8), training, steps=20, evaluate_every=1, recorder=recorder)
    losses = [evaluation.eval_loss for evaluation in recorder.evaluations]
    best = losses.index(min(losses))
    assert 0 < best < len(losses) - 1
    assert (outcome.best_step, outcome.after.loss) == (best, losses[best])
    assert are_equal(weights(model), recorder.weights[best])
    assert float(network(model).evaluate(rows(4, seed=99)).nll.mean()) == pytest.approx(losses[best], rel=1e-6)


def test_the_last_adapter_is_kept_by_default(tiny_model: Path) -> None:
    training = TRAINING.model_copy(update={"learning_rate": 0.02})
    model = load(tiny_model)
    recorder: Any = poisoning(model, set())
    outcome, _ = run(model, rows(8), training, steps=12, evaluate_every=1, recorder=recorder)
    assert outcome.best_step == 12
    assert are_equal(weights(model), recorder.weights[12])
