"""Attempts in this process: their inputs, a recording reporter, interrupted and resumed attempts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

import workers.trainer.train
from qlora_service.artifacts.store import ArtifactStore, job_key
from qlora_service.errors import Interrupted
from qlora_service.specs import Training
from qlora_service.training.checkpoint.disk_reserve import RESERVE_FILE, DiskReserve
from qlora_service.training.loop import Workload
from tests.tiny_training import Recorder
from tests.workspace import Workspace
from workers.trainer.attempt import run_attempt
from workers.trainer.context import AttemptContext, AttemptInputs
from workers.warm_base import BaseHolder

PAIRS = [
    {"prompt": f"What is {n} plus one?", "chosen": f"It is {n + 1}.", "rejected": f"No idea, perhaps {n}."}
    for n in range(24)
]
LABELLED = [
    {"prompt": f"What is {n} plus one?", "completion": f"It is {n + n % 2}.", "label": n % 2 == 1} for n in range(24)
]
TEXTS = [{"text": f"The river has {n} bridges and the house has {n + 1} windows."} for n in range(24)]


def make_inputs(workspace: Workspace, job_id: str, token: int = 1) -> AttemptInputs:
    """Inputs of an attempt at the job on the CPU."""
    job = workspace.service.jobs.get(job_id)
    scratch = workspace.settings.tmp_dir / f"{job_id}-{token}"
    scratch.mkdir(parents=True)
    return AttemptInputs(
        job=job,
        token=token,
        dataset=workspace.service.datasets.get(job.dataset_id),
        base=workspace.catalog.get("tiny"),
        artifacts=ArtifactStore(workspace.settings.resolved_artifact_url),
        scratch=scratch,
        checkpoint_dir=workspace.settings.checkpoint_dir / job_id,
        checkpoint_s=60.0,
        needs_gpu=False,
    )


class AttemptRecorder(Recorder):
    """A reporter that records its calls; `on_phase` is called with every phase."""

    def __init__(self, on_phase: Callable[[str], object] = lambda phase: None) -> None:
        super().__init__()
        self._on_phase = on_phase
        self.plan: dict[str, Any] = {}
        self.messages: list[str | None] = []
        self.warnings: list[str] = []
        self.resumed_at: int | None = None
        self.saved_steps: list[int] = []
        self.figures: dict[str, Any] = {}
        self.expected: tuple[int, int, dict[str, float]] | None = None

    def enter_phase(self, phase: str, total_steps: int | None) -> None:
        self._on_phase(phase)

    def choose_plan(self, plan: dict[str, Any], message: str | None = None) -> None:
        self.plan = dict(plan)
        self.messages.append(message)

    def warn(self, warnings: Sequence[str]) -> None:
        self.warnings += [warning for warning in warnings if warning not in self.warnings]

    def resumed(self, step: int, metrics: bytes, notes: Sequence[str]) -> None:
        self.resumed_at = step
        self.messages += notes

    def saved(self, step: int) -> None:
        self.saved_steps.append(step)

    def note(self, **figures: Any) -> None:
        self.figures |= {name: figure for name, figure in figures.items() if figure is not None}

    def expect(self, total_steps: int, evaluate_every: int, later: Mapping[str, float]) -> None:
        self.expected = (total_steps, evaluate_every, dict(later))

    def finish(self) -> dict[str, Any]:
        return dict(self.figures)


def run(
    inputs: AttemptInputs,
    on_phase: Callable[[str], object] = lambda phase: None,
    *,
    reporter: AttemptRecorder | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The result of the attempt, on a base of its own."""
    metrics_file = inputs.scratch / "metrics.jsonl"
    metrics_file.write_text('{"step": 0}\n')
    reserve = DiskReserve(inputs.checkpoint_dir / RESERVE_FILE)
    return run_attempt(
        AttemptContext(inputs, reporter or AttemptRecorder(on_phase), check, reserve, metrics_file, BaseHolder())
    )


def published_bytes(inputs: AttemptInputs, name: str) -> bytes:
    """A file that the attempt published."""
    return b"".join(inputs.artifacts.read(job_key(inputs.job.id, inputs.token, name)))


def interrupted_after(step: int, inputs: AttemptInputs) -> AttemptRecorder:
    """The reporter of the attempt, which is interrupted after `step` steps."""
    reporter = AttemptRecorder()

    def check() -> None:
        if len(reporter.steps) >= step:
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        run(inputs, reporter=reporter, check=check)
    return reporter


def next_inputs(inputs: AttemptInputs, plan: dict[str, Any], workspace: Workspace) -> AttemptInputs:
    """Inputs of the attempt after `inputs`, with the stored plan."""
    following = make_inputs(workspace, inputs.job.id, inputs.token + 1)
    return replace(following, job=replace(following.job, plan=plan))


def spy_on_loop(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of the training loop, filled in when it is called."""
    arguments: dict[str, Any] = {}
    real = workers.trainer.train.run_loop

    def spy(network: Any, objective: Any, workload: Workload, training: Training, *given: Any, **state: Any) -> Any:
        arguments.update(vars(workload), network=network, training=training)
        arguments["held_out"] = {example.line for example in workload.held_out}
        arguments["first_a"] = {n: p.detach().clone() for n, p in network.model.named_parameters() if "lora_A" in n}
        arguments["trained"] = {example.line for step in range(50) for example in workload.examples_of_step(step)}
        return real(network, objective, workload, training, *given, **state)

    monkeypatch.setattr(workers.trainer.train, "run_loop", spy)
    return arguments
