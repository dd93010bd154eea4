"""A training that was interrupted anywhere, any number of times, ends with the same bytes as one that was not."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_service.errors import Interrupted, JobCancelled, JobFailed
from qlora_service.specs import AdaLora, Adapter, Dpo, Kto, Lora, Objective, Training
from qlora_service.training.checkpoint.checkpoints import Checkpoints
from qlora_service.training.checkpoint.state import TrainingState, from_files, random_state, to_files
from qlora_service.training.evaluation.held_out import EvaluationMetrics, trainable_copies
from qlora_service.training.evaluation.row_losses import RowLosses
from qlora_service.training.loop import LossNotFinite, Outcome, StepMetrics, Unattended
from qlora_service.training.network.micro_batch import LabeledRow, PreferencePair, TrainingExample
from tests.tiny_training import CPU, CheckpointingControl, Recorder, load, rows, run

ROOT = Path(__file__).resolve().parents[3]
STEPS = 6
# At least 64 x 64 elements: bitsandbytes keeps smaller state in 32 bits.
LORA = Lora(r=64, lora_dropout=0.1)
TRAINING = Training(batch_size=4, learning_rate=1e-2, micro_batch_tokens=96, lr_scheduler_type="cosine")


def pairs(count: int, seed: int = 0) -> list[PreferencePair]:
    return [
        PreferencePair(chosen, replace(rejected, line=chosen.line))
        for chosen, rejected in zip(rows(count, seed), rows(count, seed + 1), strict=True)
    ]


def labelled(count: int, seed: int = 0) -> list[LabeledRow]:
    return [LabeledRow(row, row.line % 2 == 0) for row in rows(count, seed)]


@dataclass(frozen=True)
class Case:
    """A job; its objective determines whether examples are rows, pairs or labelled rows."""

    changes: dict[str, Any]
    adapter: Adapter = LORA
    objective: Objective | None = None

    def examples(self, count: int, seed: int = 0) -> Sequence[TrainingExample]:
        if isinstance(self.objective, Dpo):
            return pairs(count, seed)
        return labelled(count, seed) if isinstance(self.objective, Kto) else rows(count, seed)


PAGED = {optim: Case({"optim": optim}) for optim in ("paged_adamw_32bit", "paged_adamw_8bit")}
OTHERS = {
    optim: Case({"optim": optim}) for optim in ("adamw_8bit", "adamw_torch", "paged_lion_32bit", "paged_lion_8bit")
} | {
    "AdaLoRA": Case({}, AdaLora(method="adalora", init_r=8, target_r=2)),
    "DPO": Case({}, objective=Dpo(type="dpo")),
    "KTO": Case({}, objective=Kto(type="kto")),
    "NEFTune": Case({"neftune_noise_alpha": 5.0}),
    "early stopping": Case(
        {
            "learning_rate": 0.05,
            "early_stopping_patience": 2,
            "load_best_model_at_end": True,
            "lr_scheduler_type": "constant",
        }
    ),
}
CASES = PAGED | OTHERS


@dataclass
class Result:
    """Everything that a training leaves: weights, outcome, row losses, metrics."""

    weights: dict[str, torch.Tensor]
    outcome: Outcome
    row_losses: dict[str, Any]
    metrics: bytes


def attempt(
    tiny_model: Path,
    case: Case,
    recorder: Recorder,
    control: CheckpointingControl | None = None,
    resume: Checkpoints | None = None,
) -> Result:
    """Trains from the beginning, or from the last checkpoint."""
    start = None
    latest = resume.latest() if resume else None
    if latest is not None:
        start, recorder.earlier, _ = latest
    row_losses = RowLosses()
    model = load(tiny_model, adapter=case.adapter, total_steps=STEPS)
    outcome, _ = run(
        model,
        case.examples(16),
        TRAINING.model_copy(update=case.changes),
        steps=STEPS,
        held_out=case.examples(3, seed=99),
        evaluate_every=1 if "early_stopping_patience" in case.changes else 2,
        recorder=recorder,
        row_losses=row_losses,
        objective=case.objective,
        start=start,
        control=control,
    )
    return Result(trainable_copies(model), outcome, row_losses.state(), recorder.lines())


def assert_same(result: Result, expected: Result) -> None:
    for name, weight in expected.weights.items():
        assert torch.equal(result.weights[name], weight), name
    assert result.outcome == expected.outcome
    assert result.metrics == expected.metrics
    for name, column in expected.row_losses.items():
        assert column.tobytes() == result.row_losses[name].tobytes(), name


class EachState(CheckpointingControl):
    """A control that saves every state in a directory of its own."""

    def __init__(self, directory: Path, recorder: Recorder) -> None:
        super().__init__(Checkpoints(directory / "0", 1), recorder)
        self.is_due = True
        self._directory = directory

    def save(self, state: TrainingState) -> None:
        self._checkpoints = Checkpoints(self._directory / str(self.saves + 1), 1)
        super().save(state)


@pytest.mark.parametrize("name", CASES)
def test_training_resumed_after_any_step_ends_with_the_same_bytes(tiny_model: Path, tmp_path: Path, name: str) -> None:
    """Every state of the paged optimizers and of AdaLoRA; of the others an early, a middle and the last one."""
    case, recorder = CASES[name], Recorder()
    control = EachState(tmp_path, recorder)
    expected = attempt(tiny_model, case, recorder, control)
    states = list(range(1, control.saves + 1))
    if name == "early stopping":
        assert expected.outcome.steps < STEPS
        assert 0 < expected.outcome.best_step < expected.outcome.steps
    if isinstance(case.adapter, AdaLora):
        pruned = [
            bool((weight == 0).any()) for weight_name, weight in expected.weights.items() if "lora_E" in weight_name
        ]
        assert any(pruned)
    elif name not in PAGED:
        states = [states[2], states[len(states) // 2], states[-1]]
    for number in states:
        torch.manual_seed(number)
        resumed = attempt(tiny_model, case, Recorder(), resume=Checkpoints(tmp_path / str(number), 2))
        assert_same(resumed, expected)


def test_a_new_process_ends_with_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    expected = {name: attempt(tiny_model, case, Recorder()) for name, case in PAGED.items()}
    for name, case in PAGED.items():
        recorder = Recorder()
        control = CheckpointingControl(Checkpoints(tmp_path / name, 1), recorder, at_check=20)
        with pytest.raises(Interrupted):
            attempt(tiny_model, case, recorder, control)
        assert 0 < len(recorder.steps) < STEPS
    script = f"""
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("resumer", {__file__!r})
module = importlib.util.module_from_spec(spec)
sys.modules["resumer"] = module
spec.loader.exec_module(module)
module.resume_in_new_process(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script, tiny_model, tmp_path], check=True, env=environment, cwd=ROOT)
    for name, result in expected.items():
        weights, metrics = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert metrics == result.metrics
        for parameter, weight in result.weights.items():
            assert torch.equal(weights[parameter], weight), parameter


def resume_in_new_process(tiny_model: Path, directory: Path) -> None:
    """Main function of the new process."""
    for name, case in PAGED.items():
        result = attempt(tiny_model, case, Recorder(), resume=Checkpoints(directory / name, 2))
        torch.save((result.weights, result.metrics), directory / f"{name}.pt")


def test_an_interruption_at_any_check_loses_no_completed_step(tiny_model: Path, tmp_path: Path) -> None:
    """Before the first step, at a layer of a forward or a backward pass, in an evaluation, after the last step."""
    case, recorder = CASES["early stopping"], Recorder()
    counting = CheckpointingControl(Checkpoints(tmp_path / "whole", 1), recorder)
    expected = attempt(tiny_model, case, recorder, counting)
    assert counting.checks > 60
    for number in [*range(1, counting.checks, 5), counting.checks]:
        directory, recorder = tmp_path / str(number), Recorder()
        with pytest.raises(Interrupted):
            attempt(
                tiny_model, case, recorder, CheckpointingControl(Checkpoints(directory, 1), recorder, at_check=number)
            )
        checkpoints = Checkpoints(directory, 2)
        latest = checkpoints.latest()
        assert latest is not None
        assert latest[0].step == len(recorder.steps)
        resumed = Recorder()
        assert_same(attempt(tiny_model, case, resumed, resume=checkpoints), expected)
        # Only the unfinished turn is repeated.
        assert len(recorder.steps) + len(resumed.steps) == expected.outcome.steps
        assert len(recorder.evaluations) + len(resumed.evaluations) == expected.outcome.steps + 1


def test_training_interrupted_many_times_ends_with_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    case = CASES["KTO"]
    expected = attempt(tiny_model, case, Recorder())
    for token in range(1, 20):
        recorder, checkpoints = Recorder(), Checkpoints(tmp_path, token)
        try:
            result = attempt(
                tiny_model, case, recorder, CheckpointingControl(checkpoints, recorder, at_check=100), checkpoints
            )
        except Interrupted:
            continue
        assert token > 3
        return assert_same(result, expected)
    pytest.fail("it never ended")


class StateCollector(Unattended):
    """A control that keeps every state, and its files at that time."""

    def __init__(self) -> None:
        self.states: list[TrainingState] = []
        self.files: list[dict[str, bytes]] = []

    def checkpoint_is_due(self) -> bool:
        return True

    def save(self, state: TrainingState) -> None:
        self.states.append(state)
        self.files.append(to_files(state))


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "adamw_torch", "AdaLoRA", "early stopping"])
def test_a_saved_state_never_changes_and_leads_to_the_next_ones(tiny_model: Path, name: str) -> None:
    """States are written in the background while the next steps run."""
    case = CASES[name]

    def states(start: TrainingState | None = None) -> StateCollector:
        model, control = load(tiny_model, adapter=case.adapter, total_steps=STEPS), StateCollector()
        training = TRAINING.model_copy(update=case.changes)
        run(model, rows(16), training, steps=STEPS, evaluate_every=1, start=start, control=control)
        return control

    uninterrupted = states()
    assert [to_files(state) for state in uninterrupted.states] == uninterrupted.files
    # The third state: after the first step, before its evaluation.
    assert (uninterrupted.states[2].step, uninterrupted.states[2].held_out.measured_step) == (1, 0)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert states(from_files(uninterrupted.files[2])).files == uninterrupted.files[3:]


def test_a_reported_evaluation_is_not_repeated(tiny_model: Path, tmp_path: Path) -> None:
    case = PAGED["paged_adamw_32bit"]
    expected = attempt(tiny_model, case, Recorder())

    class Stopping(Recorder):
        def on_evaluation(self, metrics: EvaluationMetrics) -> None:
            super().on_evaluation(metrics)
            if metrics.step == 2:
                raise Interrupted("enough")

    recorder, resumed = Stopping(), Recorder()
    with pytest.raises(Interrupted):
        attempt(tiny_model, case, recorder, CheckpointingControl(Checkpoints(tmp_path, 1), recorder))
    assert_same(attempt(tiny_model, case, resumed, resume=Checkpoints(tmp_path, 2)), expected)
    assert [metrics.step for metrics in [*recorder.evaluations, *resumed.evaluations]] == [0, 2, 4, 6]


def test_an_observer_interrupts_after_a_completed_step(tiny_model: Path, tmp_path: Path) -> None:
    case = PAGED["paged_adamw_8bit"]
    expected = attempt(tiny_model, case, Recorder())

    class Stopping(Recorder):
        def on_step(self, metrics: StepMetrics) -> None:
            super().on_step(metrics)
            if metrics.step == 3:
                raise Interrupted("enough")

    recorder = Stopping()
    with pytest.raises(Interrupted):
        attempt(tiny_model, case, recorder, CheckpointingControl(Checkpoints(tmp_path, 1), recorder))
    checkpoints = Checkpoints(tmp_path, 2)
    assert checkpoints.latest() is not None
    assert checkpoints.durable_step == 3
    assert_same(attempt(tiny_model, case, Recorder(), resume=checkpoints), expected)


def test_a_cancelled_training_saves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    class Cancelling(CheckpointingControl):
        def check(self) -> None:
            self.checks += 1
            if self.checks == 20:
                raise JobCancelled("the job was cancelled")

    recorder = Recorder()
    control = Cancelling(Checkpoints(tmp_path, 1), recorder)
    with pytest.raises(JobCancelled):
        attempt(tiny_model, PAGED["paged_adamw_32bit"], recorder, control)
    assert control.saves == 0


def test_the_final_state_is_saved_and_resumes_without_a_step(tiny_model: Path, tmp_path: Path) -> None:
    """Publishing may be interrupted too."""
    case, recorder = CASES["early stopping"], Recorder()
    expected = attempt(tiny_model, case, recorder, CheckpointingControl(Checkpoints(tmp_path, 1), recorder))
    rng_state = random_state(CPU)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) != (0, 0, 0)  # advances the generators
    recorder, checkpoints = Recorder(), Checkpoints(tmp_path, 2)
    control = CheckpointingControl(checkpoints, recorder)
    assert_same(attempt(tiny_model, case, recorder, control, resume=checkpoints), expected)
    assert random_state(CPU) == rng_state
    assert (recorder.steps, recorder.evaluations, control.saves) == ([], [], 0)


def test_training_resumed_after_third_skipped_step_fails_with_the_same_error(tiny_model: Path, tmp_path: Path) -> None:
    """Interrupted in the evaluation of the adapter of the last finite step."""
    training = TRAINING.model_copy(update={"optim": "adamw_torch"})

    def failing(
        recorder: Recorder, control: CheckpointingControl | None = None, start: TrainingState | None = None
    ) -> None:
        """Gradients are NaN from the third step on."""
        model = load(tiny_model)
        poisoned = next(p for p in model.parameters() if p.requires_grad)
        poisoned.register_hook(lambda gradient: gradient * (float("nan") if len(recorder.steps) >= 2 else 1.0))
        run(model, rows(24), training, steps=8, recorder=recorder, start=start, control=control)

    with pytest.raises(LossNotFinite) as expected:
        failing(Recorder())

    class InTheLastEvaluation(CheckpointingControl):
        turns_after_five = 0

        def check(self) -> None:
            super().check()
            # The turn after the fifth step begins with one check; later checks belong to the evaluation.
            if self.turns_after_five == 1:
                raise Interrupted("enough")

        def checkpoint_is_due(self) -> bool:
            self.turns_after_five += len(recorder.steps) == 5
            return False

    recorder = Recorder()
    control = InTheLastEvaluation(Checkpoints(tmp_path, 1), recorder)
    with pytest.raises(Interrupted):
        failing(recorder, control)
    latest = Checkpoints(tmp_path, 2).latest()
    assert latest is not None
    assert latest[0].history.skipped_in_a_row == 3
    with pytest.raises(LossNotFinite) as resumed:
        failing(Recorder(), start=latest[0])
    assert (resumed.value.message, resumed.value.details) == (expected.value.message, expected.value.details)
    assert resumed.value.outcome == expected.value.outcome


def test_the_state_of_another_optimizer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    attempt(tiny_model, PAGED["paged_adamw_8bit"], recorder, CheckpointingControl(Checkpoints(tmp_path, 1), recorder))
    with pytest.raises(JobFailed, match="does not fit this job's optimizer"):
        attempt(tiny_model, PAGED["paged_adamw_32bit"], Recorder(), resume=Checkpoints(tmp_path, 2))
