"""How an attempt gets on, for the queue and for the metrics file."""

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
from workers.trainer.heartbeat import ClaimKeeper
from workers.trainer.measurements import Measuring

if TYPE_CHECKING:
    from qlora_service.training.evaluation.held_out import EvaluationMetrics
    from qlora_service.training.loop import StepMetrics


class JobReporter:
    """Writes progress and metrics under the claim, and to the metrics file that is published."""

    def __init__(
        self,
        queue: Queue,
        claim: Claim,
        keeper: ClaimKeeper,
        metrics_file: Path,
        patience_s: float,
        measuring: Measuring,
    ) -> None:
        self._patience_s = patience_s
        self._queue, self._claim, self._keeper = queue, claim, keeper
        self._file = metrics_file.open("w", encoding="utf-8")
        self._measuring = measuring
        self._is_trained = False
        self._latest: dict[str, Any] = {}

    def enter_phase(self, phase: str, total_steps: int | None) -> None:
        self._measuring.enter_phase(phase)
        self._keeper.enter_phase()
        eta = self._measuring.later_s if self._is_trained else None
        self._tell(
            Progress(
                phase=phase, total_steps=total_steps, eta_s=eta and round(eta, 1), measured=self._measuring.record()
            ),
            phase,
        )
        self._is_trained = self._is_trained or phase == "training"
        self._keeper.check()

    def close(self) -> None:
        """Nothing else is to be written."""
        self._file.close()

    def note(self, **figures: Any) -> None:
        self._measuring.note(**figures)

    def expect(self, total_steps: int, evaluate_every: int, later: Mapping[str, float]) -> None:
        self._measuring.expect(total_steps, evaluate_every, later)

    def finish(self) -> dict[str, Any]:
        measured = self._measuring.finish()
        self._tell(Progress(measured=measured))
        return measured

    def choose_plan(self, plan: dict[str, Any], message: str | None = None) -> None:
        """The plan that every later attempt takes over, and why it is not the one before."""
        self._tell(Progress(plan=plan), message)

    def resumed(self, step: int, metrics: bytes, notes: Sequence[str]) -> None:
        """A later attempt goes on behind `step`, 0 for the beginning, with the metrics so far."""
        self._file.write(metrics.decode())
        self._file.flush()
        first = f"resumed after step {step}" if step else "no checkpoint was made yet: started again"
        progress = Progress(step=step, checkpoint_step=step)
        self._tell(progress, "; ".join([first, *notes]), resumed_from_step=step)

    def saved(self, step: int) -> None:
        """A checkpoint of `step` completed steps is durable."""
        self._tell(Progress(checkpoint_step=step))

    def on_step(self, metrics: StepMetrics) -> None:
        eta = self._measuring.on_step(metrics.step, metrics.tokens)
        self._record("metrics", finite_or_null(asdict(metrics)), Progress(step=metrics.step, eta_s=round(eta, 1)))

    def on_evaluation(self, metrics: EvaluationMetrics) -> None:
        self._measuring.on_evaluation()
        self._record("evaluation", finite_or_null(asdict(metrics)), Progress())

    def _record(self, kind: str, values: dict[str, Any], progress: Progress) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        self._latest |= values
        self._report(replace(progress, metrics=dict(self._latest)), (kind, values))

    def _tell(self, progress: Progress, message: str | None = None, **values: Any) -> None:
        self._report(progress, None if message is None else ("log", {"message": message, **values}))

    def _report(self, progress: Progress, event: tuple[str, dict[str, Any]] | None) -> None:
        if event is not None:
            event = event[0], {**event[1], "attempt": self._claim.token}
        self._keeper.heard(persist(lambda: self._queue.report(self._claim, progress, event), self._patience_s))
