"""Fixtures and helpers for tests of the control plane: a manual clock, real databases, a queue, queued jobs."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from qlora_service.domain.datasets import Dataset, DatasetReport
from qlora_service.domain.ids import new_id
from qlora_service.domain.jobs import TRANSITIONS, HoldReason, Job, JobEvent, JobStatus
from qlora_service.domain.keys import LOCAL_PROJECT
from qlora_service.domain.row_warnings import RowWarning
from qlora_service.queue.claim import Claim, Progress
from qlora_service.queue.queue import Queue
from qlora_service.specs import JobSpec
from qlora_service.store.database import Database
from qlora_service.store.datasets import insert_dataset
from qlora_service.store.jobs import events_after, get_job, insert_job
from qlora_service.store.tables import datasets, metadata

LEASE_S = 30.0
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
REPOSITORY = Path(__file__).parents[1]

DISK_FULL = {"reason": HoldReason.DISK_FULL, "message": "no space left", "needs_bytes": 1000}
ERROR = {"code": "job_failed", "message": "it died"}

CLAIM_WRITES: dict[str, Callable[[Queue, Claim], object]] = {
    "renew": lambda queue, claim: queue.renew(claim),
    "report": lambda queue, claim: queue.report(claim, Progress(step=7, metrics={"loss": 1}), ("metrics", {"step": 7})),
    "warn": lambda queue, claim: queue.warn(claim, ["odd rows"]),
    "succeed": lambda queue, claim: queue.succeed(claim, {"attempt": claim.token}),
    "fail": lambda queue, claim: queue.fail(claim, ERROR),
    "cancelled": lambda queue, claim: queue.cancelled(claim),
    "release": lambda queue, claim: queue.release(claim, "the worker was stopped"),
    "pause": lambda queue, claim: queue.pause(claim, DISK_FULL),
    "died": lambda queue, claim: queue.died(claim, {"message": "it was killed"}),
}
"""Every write of a running attempt, by the name of the queue's method"""

JobRequest = Callable[[Connection, str, datetime], Job]
"""A function of `queue.requests`"""


class SteppedClock:
    """A wall clock and a lease clock that only `advance` moves."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def lease_clock(self, _connection: object) -> tuple[str, float]:
        """Name and seconds of the clock that measures leases."""
        return "stepped", (self.now - START).total_seconds()


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock()


def sqlite_database(directory: Path) -> Database:
    """A migrated SQLite file in the directory: a copy, because a migration takes far longer."""
    path = directory / "state.db"
    path.write_bytes(_migrated_file())
    return Database(f"sqlite:///{path}")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """A migrated SQLite file."""
    database = sqlite_database(tmp_path)
    yield database
    database.close()


@pytest.fixture(name="database", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def each_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """Runs each test on a migrated SQLite file and on PostgreSQL; imported instead of `database`."""
    if request.param == "sqlite":
        database = sqlite_database(tmp_path)
    else:
        database = Database(request.getfixturevalue("postgres_url"))
    yield database
    database.close()


@pytest.fixture
def queue(database: Database, clock: SteppedClock) -> Queue:
    return Queue(database, lease_s=LEASE_S, clock=clock, leases=clock.lease_clock)


def new_dataset(sha256: str = "0" * 64, shape: Any = "text", project: str = LOCAL_PROJECT) -> Dataset:
    """A dataset of three rows, not stored."""
    report = DatasetReport("jsonl", shape, bytes=42, rows=3, usable_rows=3, finding_count=0, findings=())
    return Dataset(new_id("ds"), project, sha256, "rows.jsonl", START, report)


def add_row_warning(database: Database, dataset_id: str, warning: RowWarning) -> None:
    """Adds a warning to the stored report of a dataset."""
    of_dataset = datasets.c.id == dataset_id
    with database.write() as connection:
        report = connection.execute(sa.select(datasets.c.report).where(of_dataset)).scalar_one()
        changed = report | {"warnings": [*report["warnings"], warning.as_dict()]}
        connection.execute(sa.update(datasets).where(of_dataset).values(report=changed))


def add_job(database: Database, *, project: str = LOCAL_PROJECT, **spec: Any) -> str:
    """The id of a new queued job on the project's only `new_dataset`."""
    job_id, job_spec = new_id("job"), JobSpec.model_validate({"base_model": "tiny", **spec})
    with database.write() as connection:
        dataset = insert_dataset(connection, new_dataset(project=project))
        insert_job(connection, job_id, project, job_spec, dataset.id, "0" * 64, START)
    return job_id


def stored_rows(database: Database) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of every table, by table name."""
    with database.read() as connection:
        return {
            table.name: [tuple(row) for row in connection.execute(sa.select(table).order_by(*table.primary_key))]
            for table in metadata.sorted_tables
        }


def job_events(database: Database, job_id: str) -> list[JobEvent]:
    with database.read() as connection:
        return events_after(connection, job_id)


def status_history(database: Database, job_id: str) -> list[str]:
    """The job's statuses so far, from its events."""
    return [event.data["status"] for event in job_events(database, job_id) if event.type == "status"]


# One process imports and forks the others: starting six interpreters would take most of a test's time.
_FORKS = """
import json, multiprocessing, sys
fork = multiprocessing.get_context("fork")
start = fork.Barrier(int(sys.argv[1]))
def run(_):
    start.wait()
    return work(*sys.argv[2:])
with fork.Pool(start.parties) as pool:
    print(json.dumps(pool.map(run, range(start.parties), chunksize=1)))
"""


def run_in_processes(script: str, *arguments: str, processes: int) -> list[Any]:
    """The results of the script's function `work(*arguments)`, called at the same time in several processes."""
    command = [sys.executable, "-c", script + _FORKS, str(processes), *arguments]
    completed = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=False)
    assert completed.returncode == 0, completed.stderr
    results: list[Any] = json.loads(completed.stdout)
    return results


def send_request(database: Database, request: JobRequest, job_id: str, now: datetime = START) -> Job:
    """The job after a user's request, which runs in its own transaction."""
    with database.write() as connection:
        return request(connection, job_id, now)


def claim_next(queue: Queue, worker: str = "host:1:0") -> Claim:
    claimed = queue.claim(worker)
    assert claimed is not None
    return claimed[0]


def read_job(database: Database, job_id: str) -> Job:
    with database.read() as connection:
        return get_job(connection, job_id)


def assert_history_is_legal(database: Database, job_id: str) -> None:
    history = [JobStatus(status) for status in status_history(database, job_id)]
    assert history[0] is JobStatus.QUEUED
    for before, after in itertools.pairwise(history):
        assert after in TRANSITIONS[before], history
    assert history[-1] is read_job(database, job_id).status


@cache
def _migrated_file() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "state.db"
        database = Database(f"sqlite:///{path}")
        database.migrate()
        database.close()
        return path.read_bytes()
