"""The control plane on real databases: a clock that tests move, SQLite or each database, a queue, jobs to claim."""

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
from qlora_service.queue.claim import Claim, Progress
from qlora_service.queue.queue import Queue
from qlora_service.specs import JobSpec
from qlora_service.store.database import Database
from qlora_service.store.datasets import insert_dataset
from qlora_service.store.jobs import events_after, get_job, insert_job
from qlora_service.store.tables import metadata

LEASE_S = 30.0
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
REPOSITORY = Path(__file__).parents[1]

DISK_FULL = {"reason": HoldReason.DISK_FULL, "message": "no space left", "needs_bytes": 1000}
ERROR = {"code": "job_failed", "message": "it died"}

# Every write of a running attempt.
VERBS: dict[str, Callable[[Queue, Claim], object]] = {
    "renew": lambda queue, claim: queue.renew(claim),
    "report": lambda queue, claim: queue.report(claim, Progress(step=7, metrics={"loss": 1}), ("metrics", {"step": 7})),
    "succeed": lambda queue, claim: queue.succeed(claim, {"attempt": claim.token}),
    "fail": lambda queue, claim: queue.fail(claim, ERROR),
    "cancelled": lambda queue, claim: queue.cancelled(claim),
    "release": lambda queue, claim: queue.release(claim, "the worker was stopped"),
    "pause": lambda queue, claim: queue.pause(claim, DISK_FULL),
    "died": lambda queue, claim: queue.died(claim, {"message": "it was killed"}),
}

Request = Callable[[Connection, str, datetime], Job]


class SteppedClock:
    """Stands still until told to advance."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def lease_clock(self, _connection: object) -> tuple[str, float]:
        """The same time as leases are measured by."""
        return "stepped", (self.now - START).total_seconds()


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock()


def sqlite_database(directory: Path) -> Database:
    """A migrated SQLite file in the directory, copied from one that was migrated: that takes far longer."""
    path = directory / "state.db"
    path.write_bytes(_migrated())
    return Database(f"sqlite:///{path}")


@cache
def _migrated() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "state.db"
        database = Database(f"sqlite:///{path}")
        database.migrate()
        database.close()
        return path.read_bytes()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """A migrated SQLite file."""
    database = sqlite_database(tmp_path)
    yield database
    database.close()


@pytest.fixture(name="database", params=["sqlite", "postgresql"])
def each_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A migrated SQLite file, then a PostgreSQL database: for the tests that import this in place of `database`."""
    if request.param == "sqlite":
        database = sqlite_database(tmp_path)
    else:
        database = Database(request.getfixturevalue("postgres_url"))
    yield database
    database.close()


@pytest.fixture
def queue(database: Database, clock: SteppedClock) -> Queue:
    return Queue(database, lease_s=LEASE_S, clock=clock, leases=clock.lease_clock)


def dataset_row(sha256: str = "0" * 64, shape: Any = "text", project: str = LOCAL_PROJECT) -> Dataset:
    """A dataset of three rows that is not stored yet."""
    report = DatasetReport("jsonl", shape, bytes=42, rows=3, usable_rows=3, finding_count=0, findings=())
    return Dataset(new_id("ds"), project, sha256, "rows.jsonl", START, report)


def add_job(database: Database, *, project: str = LOCAL_PROJECT, **spec: Any) -> str:
    """The id of a new queued job over the project's one dataset of `dataset_row`."""
    job_id, wanted = new_id("job"), JobSpec.model_validate({"base_model": "tiny", **spec})
    with database.write() as connection:
        dataset = insert_dataset(connection, dataset_row(project=project))
        insert_job(connection, job_id, project, wanted, dataset.id, "0" * 64, START)
    return job_id


def stored_rows(database: Database) -> dict[str, list[tuple[Any, ...]]]:
    """Everything in every table."""
    with database.read() as connection:
        return {
            table.name: [tuple(row) for row in connection.execute(sa.select(table).order_by(*table.primary_key))]
            for table in metadata.sorted_tables
        }


def job_events(database: Database, job_id: str) -> list[JobEvent]:
    with database.read() as connection:
        return events_after(connection, job_id)


def status_history(database: Database, job_id: str) -> list[str]:
    """The statuses the job went through, by its events."""
    return [event.data["status"] for event in job_events(database, job_id) if event.type == "status"]


# One process imports, the others are its forks: the start of six interpreters would be most of a test.
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


def run_together(script: str, *arguments: str, processes: int) -> list[Any]:
    """What the script's function `work(*arguments)` returns in each of several processes that start it together."""
    command = [sys.executable, "-c", script + _FORKS, str(processes), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    results: list[Any] = json.loads(ended.stdout)
    return results


def ask(database: Database, request: Request, job_id: str, now: datetime = START) -> Job:
    """A user's request about a job, in a transaction of its own."""
    with database.write() as connection:
        return request(connection, job_id, now)


def claim_next(queue: Queue, worker: str = "host:1:0") -> Claim:
    claimed = queue.claim(worker)
    assert claimed is not None
    return claimed[0]


def job_of(database: Database, job_id: str) -> Job:
    with database.read() as connection:
        return get_job(connection, job_id)


def assert_history_is_legal(database: Database, job_id: str) -> None:
    history = [JobStatus(status) for status in status_history(database, job_id)]
    assert history[0] is JobStatus.QUEUED
    for before, after in itertools.pairwise(history):
        assert after in TRANSITIONS[before], history
    assert history[-1] is job_of(database, job_id).status
