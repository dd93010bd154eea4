"""Latency of claims in a queue with a long history, on both databases: `python -m tests.chaos.claim_latency`."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Connection

from qlora_service.domain.jobs import JobStatus
from qlora_service.queue.queue import Queue
from qlora_service.specs import JobSpec
from qlora_service.store.database import Database
from qlora_service.store.datasets import insert_dataset
from qlora_service.store.tables import events, jobs
from tests.control_plane import new_dataset
from tests.postgres import NOT_INSTALLED, installed_programs, running_postgres

MAX_P99_MS = 10
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
METRICS = {"loss": 1.7342, "learning_rate": 0.0002, "grad_norm": 0.2871, "tokens_per_s": 812.4}
BATCH_ROWS = 2_000


def measure(url: str, finished: int = 100_000, queued: int = 1_000, claims: int = 1_000) -> float:
    """The 99th percentile of sequential calls of `Queue.claim` in ms, on a new database at `url`."""
    database = Database(url)
    try:
        database.migrate()
        with database.write() as connection:
            _fill(connection, finished, queued)
        queue = Queue(database, lease_s=30)
        elapsed_ms = sorted(_claim_ms(queue) for _ in range(claims))
        return elapsed_ms[int(0.99 * (len(elapsed_ms) - 1))]
    finally:
        database.close()


def main() -> None:
    # Not /tmp, which may be in memory: the figure is for a disk.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        _print("SQLite", measure(f"sqlite:///{Path(directory) / 'state.db'}"))
    if installed_programs() is not None:
        # With fsync, unlike the server of the tests.
        with running_postgres([], parent=Path("/var/tmp")) as server:
            _print("PostgreSQL", measure(server.create("claims")))
    else:
        print(json.dumps({"skipped": NOT_INSTALLED}))


def _claim_ms(queue: Queue) -> float:
    started = time.perf_counter()
    claimed = queue.claim("host:1:0")
    elapsed_s = time.perf_counter() - started
    assert claimed is not None, "measure with no more claims than queued jobs"
    return 1000 * elapsed_s


def _fill(connection: Connection, finished: int, queued: int) -> None:
    dataset = insert_dataset(connection, new_dataset())
    for rows in _batches(finished + queued):
        connection.execute(jobs.insert(), [_job(i, dataset.id, ended=i < finished) for i in rows])
        connection.execute(events.insert(), [event for i in rows for event in _events(i, ended=i < finished)])


def _batches(count: int) -> Iterator[range]:
    for start in range(0, count, BATCH_ROWS):
        yield range(start, min(start + BATCH_ROWS, count))


def _job(i: int, dataset_id: str, *, ended: bool) -> dict[str, Any]:
    """A row as the service writes it; every job has the same columns, so that many are inserted at once."""
    priority = int(i % 7 == 0)  # most jobs have the default
    spec = JobSpec.model_validate({"base_model": "tiny", "priority": priority}).model_dump(mode="json")
    at = START + timedelta(seconds=i)
    outcomes = (JobStatus.SUCCEEDED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)
    return {
        "id": _id(i),
        "status": outcomes[i % len(outcomes)] if ended else JobStatus.QUEUED,
        "spec": spec,
        "base_model": "tiny",
        "base_weights_sha256": "0" * 64,
        "dataset_id": dataset_id,
        "priority": priority,
        "created_at": at,
        "started_at": at if ended else None,
        "finished_at": at + timedelta(minutes=20) if ended else None,
        "attempt": int(ended),
        "step": 100 if ended else 0,
        "total_steps": 100 if ended else None,
        "metrics": METRICS if ended else {},
        "result": {"attempt": 1, "losses": METRICS} if ended else None,
    }


def _events(i: int, *, ended: bool) -> Iterator[dict[str, Any]]:
    at = START + timedelta(seconds=i)
    statuses = (JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.SUCCEEDED) if ended else (JobStatus.QUEUED,)
    for status in statuses:
        yield {"job_id": _id(i), "at": at, "type": "status", "data": {"status": status}}
    if ended:
        yield {"job_id": _id(i), "at": at, "type": "metrics", "data": {"step": 100, **METRICS}}


def _id(i: int) -> str:
    return f"job_{i:022x}"


def _print(name: str, p99_ms: float) -> None:
    line = {"figure": f"claim p99, {name}, 100,000 finished and 1,000 queued", "value": round(p99_ms, 2), "unit": "ms"}
    print(json.dumps({**line, "must": MAX_P99_MS, "better": "lower"}), flush=True)


if __name__ == "__main__":
    main()
