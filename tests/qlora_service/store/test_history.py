from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from qlora_service.queue.claim import Progress
from qlora_service.queue.queue import Queue
from qlora_service.store.database import Database
from qlora_service.store.history import measured_anywhere, measured_on
from qlora_service.store.tables import jobs
from tests.control_plane import SteppedClock, add_job, claim_next, clock, each_database, queue, sqlite_database

__all__ = ["clock", "each_database", "queue"]

BASE, OTHER_BASE = "0" * 64, "1" * 64
CPU, GPU = {"device": "x86_64 CPU"}, {"device": "NVIDIA L4"}


def end_job(
    database: Database,
    queue: Queue,
    clock: SteppedClock,
    measured: dict[str, Any] | None,
    *,
    base: str = BASE,
    project: str = "local",
    succeeds: bool = True,
) -> None:
    """Adds a job and ends it, with this measurement."""
    job_id = add_job(database, project=project)
    with database.write() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(base_weights_sha256=base))
    claim = claim_next(queue)
    if measured is not None:
        queue.report(claim, Progress(measured=measured))
    if succeeds:
        queue.succeed(claim, {"attempt": 1})
    else:
        queue.fail(claim, {"code": "job_failed"})
    clock.advance(1)


def test_history_has_the_succeeded_jobs_of_every_project_newest_first(
    database: Database, queue: Queue, clock: SteppedClock
) -> None:
    end_job(database, queue, clock, CPU | {"steps": 1})
    end_job(database, queue, clock, GPU | {"steps": 2}, project="other")
    end_job(database, queue, clock, CPU | {"steps": 3}, succeeds=False)
    end_job(database, queue, clock, None)
    end_job(database, queue, clock, CPU | {"steps": 4}, base=OTHER_BASE)
    end_job(database, queue, clock, CPU | {"steps": 5})
    with database.read() as connection:
        assert [measured["steps"] for measured in measured_on(connection, BASE)] == [5, 2, 1]
        assert [measured["steps"] for measured in measured_on(connection, BASE, limit=1)] == [5]
        assert [measured["steps"] for measured in measured_anywhere(connection)] == [5, 4, 2, 1]


def test_history_is_read_through_its_index(tmp_path: Path) -> None:
    database = sqlite_database(tmp_path)
    statements: list[tuple[str, Any]] = []
    with closing(database), database.read() as connection:
        sa.event.listen(connection, "before_cursor_execute", lambda *args: statements.append(args[2:4]))
        measured_on(connection, BASE)
        measured_anywhere(connection)
        selects = [(query, parameters) for query, parameters in statements if query.startswith("SELECT")]
        assert len(selects) == 2
        for query, parameters in selects:
            (step,) = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}", parameters).all()
            assert "USING INDEX ix_jobs_measured" in step.detail, step
