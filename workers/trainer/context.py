"""What the stages of an attempt share: its inputs, and where it reports to."""

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
    """Everything that an attempt depends on, and the directories it may write to."""

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
    """Quantized bases of earlier jobs; None for no cache"""
    plan_cache: Path | None = None
    """Simulated memory of earlier plans"""
    history: Sequence[dict[str, Any]] = ()
    """Measurements of earlier jobs on the same base"""


class Reporter(Observer, Protocol):
    """Takes an attempt's progress."""

    def enter_phase(self, phase: str, total_steps: int | None) -> None:
        """May raise to end the attempt, as `AttemptContext.check` does."""

    def choose_plan(self, plan: dict[str, Any], message: str | None = None) -> None: ...

    def resumed(self, step: int, metrics: bytes, notes: Sequence[str]) -> None: ...

    def saved(self, step: int) -> None: ...

    def note(self, **figures: Any) -> None:
        """Figures for the record of the attempt; see `measurements.Measurements.note`."""

    def expect(self, total_steps: int, evaluate_every: int, later: Mapping[str, float]) -> None:
        """The steps to do, and the expected seconds of each phase after the training."""

    def finish(self) -> dict[str, Any]:
        """Stores and returns the attempt's record; no more figures follow."""


@dataclass(frozen=True)
class AttemptContext:
    """One attempt: its inputs, and the objects through which it has effects."""

    inputs: AttemptInputs
    reporter: Reporter
    check: Callable[[], None]
    """Called often; raises Interrupted or JobCancelled to end the attempt"""
    reserve: DiskReserve
    metrics_file: Path
    bases: BaseHolder
    """Has the base that an earlier job left loaded; keeps this one for the next"""

    @property
    def job(self) -> Job:
        return self.inputs.job

    @property
    def spec(self) -> JobSpec:
        return self.inputs.job.spec
