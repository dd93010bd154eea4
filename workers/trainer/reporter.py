"""Reports an attempt's progress to the queue and to the metrics file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_service.domain.metrics import finite_or_null
from qlora_service.queue.claim import Claim, Progress
from qlora_service.queue.queue import Queue
from qlora_service.store.database import persist
from workers.trainer.heartbeat import Heartbeat
from workers.trainer.measurements import AttemptMeasurements

if TYPE_CHECKING:
    from qlora_service.training.evaluation.held_out import EvaluationMetrics
    from qlora_service.training.loop import StepMetrics


class JobReporter:
    """Writes progress and metrics under the claim, and metrics to the file that is published."""

    def __init__(
        self,
        queue: Queue,
        claim: Claim,
        heartbeat: Heartbeat,
        metrics_file: Path,
        patience_s: float,
        measurements: AttemptMeasurements,
    ) -> None:
        """`patience_s` is how long a write is retried during a database outage."""
        self._patience_s = patience_s
        self._queue, self._claim, self._heartbeat = queue, claim, heartbeat
        self._file = metrics_file.open("w", encoding="utf-8")
        self._measurements = measurements
        self._is_trained = False
        self._latest_metrics: dict[str, Any] = {}

    def enter_phase(self, phase: str, total_steps: int | None) -> None:
        self._measurements.enter_phase(phase)
        self._heartbeat.enter_phase()
        eta_s = self._measurements.later_s if self._is_trained else None
        progress = Progress(
            phase=phase,
            total_steps=total_steps,
            eta_s=eta_s and round(eta_s, 1),
            measured=self._measurements.record(),
        )
        self._report_message(progress, phase)
        self._is_trained = self._is_trained or phase == "training"
        self._heartbeat.check()

    def close(self) -> None:
        """Closes the metrics file."""
        self._file.close()

    def note(self, **figures: Any) -> None:
        self._measurements.note(**figures)

    def expect(self, total_steps: int, evaluate_every: int, later: Mapping[str, float]) -> None:
        self._measurements.expect(total_steps, evaluate_every, later)

    def finish(self) -> dict[str, Any]:
        record = self._measurements.finish()
        self._report(Progress(measured=record))
        return record

    def choose_plan(self, plan: dict[str, Any], message: str | None = None) -> None:
        """Stores the plan that every later attempt inherits; `message` is its event for the user."""
        self._report_message(Progress(plan=plan), message)

    def warn(self, warnings: Sequence[str]) -> None:
        """Adds the warnings that the job does not have yet."""
        if warnings:
            persist(lambda: self._queue.warn(self._claim, warnings), self._patience_s)

    def resumed(self, step: int, metrics: bytes, notes: Sequence[str]) -> None:
        """Reports that the attempt resumes after `step` (0: from the beginning), with the metrics up to there."""
        self._file.write(metrics.decode())
        self._file.flush()
        start = f"resumed after step {step}" if step else "no checkpoint was saved yet: started from the beginning"
        progress = Progress(step=step, checkpoint_step=step)
        self._report_message(progress, "; ".join([start, *notes]), resumed_from_step=step)

    def saved(self, step: int) -> None:
        """Reports a durable checkpoint of `step` completed steps."""
        self._report(Progress(checkpoint_step=step))

    def on_step(self, metrics: StepMetrics) -> None:
        eta_s = self._measurements.on_step(metrics.step, metrics.tokens)
        progress = Progress(step=metrics.step, eta_s=round(eta_s, 1))
        self._report_metrics("metrics", finite_or_null(asdict(metrics)), progress)

    def on_evaluation(self, metrics: EvaluationMetrics) -> None:
        self._measurements.on_evaluation()
        self._report_metrics("evaluation", finite_or_null(asdict(metrics)), Progress())

    def _report_metrics(self, event_type: str, values: dict[str, Any], progress: Progress) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        self._latest_metrics |= values
        self._report(replace(progress, metrics=dict(self._latest_metrics)), (event_type, values))

    def _report_message(self, progress: Progress, message: str | None, **values: Any) -> None:
        self._report(progress, None if message is None else ("log", {"message": message, **values}))

    def _report(self, progress: Progress, event: tuple[str, dict[str, Any]] | None = None) -> None:
        if event is not None:
            event = event[0], {**event[1], "attempt": self._claim.token}
        request = persist(lambda: self._queue.report(self._claim, progress, event), self._patience_s)
        self._heartbeat.receive(request)
