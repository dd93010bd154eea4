"""When a running attempt saves checkpoints, and who is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from qlora_service.training.checkpoint.checkpoints import Checkpoints
from qlora_service.training.checkpoint.disk_reserve import Ballast
from qlora_service.training.checkpoint.state import TrainingState
from qlora_service.training.loop import Observer
from workers.trainer.environment import change_note


class Reporter(Observer, Protocol):
    """Who is told how an attempt gets on."""

    def enter_phase(self, phase: str, total_steps: int | None) -> None:
        """May raise to end the attempt, as `check` does."""

    def choose_plan(self, plan: dict[str, Any], message: str | None = None) -> None: ...

    def resumed(self, step: int, metrics: bytes, notes: Sequence[str]) -> None: ...

    def saved(self, step: int) -> None: ...

    def note(self, **figures: Any) -> None:
        """Figures for the record of what the attempt took; see `workers.trainer.measurements`."""

    def expect(self, total_steps: int, evaluate_every: int, later: Mapping[str, float]) -> None:
        """What is to be done, and the seconds that the phases behind the training are likely to take."""

    def finish(self) -> dict[str, Any]:
        """All that the attempt took, which is stored; nothing else is to come."""


class Checkpointing:
    """The training loop's control: a checkpoint every `every_s` seconds, and whenever the training is interrupted."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        reporter: Reporter,
        check: Callable[[], None],
        ballast: Ballast,
        *,
        every_s: float,
        checkpoint_bytes: int,
        room_at_end: int,
        metrics_file: Path,
        environment: dict[str, Any],
        plan: dict[str, Any],
    ) -> None:
        self._checkpoints, self._reporter, self._check, self._ballast = checkpoints, reporter, check, ballast
        self._every_s = every_s
        self._checkpoint_bytes = checkpoint_bytes
        self._metrics_file = metrics_file
        self._environment = environment
        self._plan = plan
        self._room_at_end = room_at_end
        self._due_at = time.monotonic() + every_s
        self._told_step = checkpoints.durable_step

    def check(self) -> None:
        self._tell_durable()
        self._check()

    def checkpoint_is_due(self) -> bool:
        return time.monotonic() >= self._due_at

    def save(self, state: TrainingState) -> None:
        # The first ones take the ballast's room, later ones that of those they replace.
        spare = self._ballast.wanted_bytes - self._room_at_end
        if spare > 0:
            self._ballast.shrink(min(spare, self._checkpoint_bytes))
        self._checkpoints.save(state, self._metrics_file.read_bytes(), self._environment)
        self._due_at = time.monotonic() + self._every_s

    def plan_changed(self, change: dict[str, Any]) -> None:
        self._plan[change["what"]] = change["to"]
        self._plan["changes"] = [*self._plan["changes"], change]
        self._reporter.choose_plan(self._plan, change_note(change))

    def flush(self) -> None:
        """Wait until what was saved is on the disk, and tell. Raises: OSError."""
        self._checkpoints.flush()
        self._tell_durable()

    def _tell_durable(self) -> None:
        step = self._checkpoints.durable_step
        if step is not None and step != self._told_step:
            self._told_step = step
            self._reporter.saved(step)
