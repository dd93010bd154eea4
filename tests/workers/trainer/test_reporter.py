"""Reports of an attempt to the queue and to its metrics file, on both databases."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from qlora_service.queue.queue import Queue
from qlora_service.store.database import Database
from qlora_service.store.jobs import events_after, get_job
from qlora_service.training.evaluation.held_out import EvaluationMetrics
from qlora_service.training.loop import StepMetrics
from tests.control_plane import add_job, claim_next, clock, each_database, queue
from workers.trainer.heartbeat import Heartbeat
from workers.trainer.measurements import AttemptMeasurements
from workers.trainer.reporter import JobReporter

__all__ = ["clock", "each_database", "queue"]


def refuse_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_is_reported_with_null(
    database: Database, queue: Queue, tmp_path: Path, value: float
) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    heartbeat = Heartbeat(queue, claim, interval_s=1, lease_s=60, hang_s=60)
    reporter = JobReporter(
        queue, claim, heartbeat, tmp_path / "metrics.jsonl", 1.0, AttemptMeasurements(1, None, None, time.monotonic())
    )
    reporter.on_step(StepMetrics(1, value, 1e-4, value, True, 10, 20, 5.0, 1000))
    reporter.on_evaluation(EvaluationMetrics(1, 2.0, 0.5, value, 1000))
    reporter.close()

    lines = [
        json.loads(line, parse_constant=refuse_constant)
        for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [(line.get("loss"), line.get("grad_norm"), line.get("skipped")) for line in lines] == [
        (None, None, True),
        (None, None, None),
    ]
    assert lines[1]["eval_perplexity"] is None
    with database.read() as connection:
        events = [event.data for event in events_after(connection, job_id, types=("metrics", "evaluation"))]
        metrics = get_job(connection, job_id).metrics
    assert [{**data, "attempt": None} for data in events] == [{**line, "attempt": None} for line in lines]
    assert (metrics["loss"], metrics["skipped"], metrics["eval_loss"]) == (None, True, 2.0)
