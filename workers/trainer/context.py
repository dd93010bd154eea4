"""The context that the stages of an attempt share: its inputs, and the objects through which it has effects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qlora_service.artifacts.store import ArtifactStore
from qlora_service.domain.datasets import Dataset
from qlora_service.domain.jobs import Job
from qlora_service.models.base.quantized_cache import QuantizedCache
from qlora_service.models.catalog.catalog import BaseModel
from qlora_service.specs import JobSpec
from qlora_service.training.checkpoint.disk_reserve import DiskReserve
from qlora_service.training.loop import Observer
from workers.warm_base import BaseHolder


@dataclass(frozen=True)
class AttemptInputs:
    """Everything that an attempt depends on, and the directories that it may write to."""

    job: Job
    token: int
    dataset: Dataset
    base: BaseModel
    artifacts: ArtifactStore
    scratch: Path
    checkpoint_dir: Path
    checkpoint_s: float
    """Seconds between checkpoints"""
    needs_gpu: bool
    """The slot is a GPU: fail rather than train on the CPU"""
    validation: Dataset | None = None
    """The dataset of the held-out rows, if not the training dataset"""
    cache: QuantizedCache | None = None
    """Quantized bases of earlier jobs; None: no cache"""
    plan_cache: Path | None = None
    """Simulated memory of earlier plans"""
    history: Sequence[dict[str, Any]] = ()
    """Measurements of earlier jobs on the same base"""


class Reporter(Observer, Protocol):
    """Receives an attempt's progress."""

    def enter_phase(self, phase: str, total_steps: int | None) -> None:
        """May raise to end the attempt, as `AttemptContext.check` does."""

    def choose_plan(self, plan: dict[str, Any], message: str | None = None) -> None: ...

    def warn(self, warnings: Sequence[str]) -> None:
        """Adds the warnings that the job does not have yet."""

    def resumed(self, step: int, metrics: bytes, notes: Sequence[str]) -> None: ...

    def saved(self, step: int) -> None: ...

    def note(self, **figures: Any) -> None:
        """Adds figures to the attempt's record; see `AttemptMeasurements.note`."""

    def expect(self, total_steps: int, evaluate_every: int, later: Mapping[str, float]) -> None:
        """Sets the number of steps, the evaluation interval, and the expected seconds of each phase after training."""

    def finish(self) -> dict[str, Any]:
        """Stores and returns the attempt's record; the last call."""


@dataclass(frozen=True)
class AttemptContext:
    """One attempt: its inputs, and the objects through which it has effects."""

    inputs: AttemptInputs
    reporter: Reporter
    check: Callable[[], None]
    """Called at least once per step; raises Interrupted or JobCancelled to end the attempt"""
    reserve: DiskReserve
    metrics_file: Path
    bases: BaseHolder
    """Holds the base that an earlier job loaded, and keeps this job's base for the next one"""

    @property
    def job(self) -> Job:
        return self.inputs.job

    @property
    def spec(self) -> JobSpec:
        return self.inputs.job.spec
