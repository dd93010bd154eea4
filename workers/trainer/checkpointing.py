"""Checkpoints of a running attempt: saved when due, reported when durable."""

from __future__ import annotations

import time
from typing import Any

from qlora_service.training.checkpoint.checkpoints import Checkpoints
from qlora_service.training.checkpoint.state import TrainingState
from qlora_service.training.loop import AroundStep
from workers.trainer.context import AttemptContext
from workers.trainer.environment import change_note
from workers.trainer.load import LoadedNetwork


class Checkpointing:
    """The training loop's control: a checkpoint every `checkpoint_s` seconds, and whenever training is interrupted."""

    def __init__(
        self,
        context: AttemptContext,
        checkpoints: Checkpoints,
        loaded: LoadedNetwork,
        around_step: AroundStep,
        *,
        checkpoint_bytes: int,
        bytes_at_end: int,
    ) -> None:
        """`checkpoint_bytes` is the size of one checkpoint; `bytes_at_end` of the reserve are kept for publishing."""
        self._context, self._checkpoints = context, checkpoints
        self._plan, self._environment = loaded.plan, loaded.environment
        self.around_step = around_step
        self._checkpoint_bytes = checkpoint_bytes
        self._bytes_at_end = bytes_at_end
        self._due_at = time.monotonic() + context.inputs.checkpoint_s
        self._reported_step = checkpoints.durable_step

    def check(self) -> None:
        self._report_durable()
        self._context.check()

    def checkpoint_is_due(self) -> bool:
        return time.monotonic() >= self._due_at

    def save(self, state: TrainingState) -> None:
        # The first checkpoints take space from the reserve; later ones reuse that of the checkpoints they replace.
        spare = self._context.reserve.wanted_bytes - self._bytes_at_end
        if spare > 0:
            self._context.reserve.shrink(min(spare, self._checkpoint_bytes))
        self._checkpoints.save(state, self._context.metrics_file.read_bytes(), self._environment)
        self._due_at = time.monotonic() + self._context.inputs.checkpoint_s

    def plan_changed(self, change: dict[str, Any]) -> None:
        self._plan[change["what"]] = change["to"]
        self._plan["changes"] = [*self._plan["changes"], change]
        self._context.reporter.choose_plan(self._plan, change_note(change))

    def flush(self) -> None:
        """Waits until saved checkpoints are durable, and reports them. Raises: OSError."""
        self._checkpoints.flush()
        self._report_durable()

    def _report_durable(self) -> None:
        step = self._checkpoints.durable_step
        if step is not None and step != self._reported_step:
            self._reported_step = step
            self._context.reporter.saved(step)
