"""Writes of a job's status, against the state machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from qlora_service.domain.jobs import TRANSITIONS, JobStatus
from qlora_service.queue.transitions import USER_HOLD, end, enqueue, hold
from qlora_service.store.database import Database
from qlora_service.store.tables import jobs
from tests.control_plane import START, add_job, each_database, read_job, stored_rows

__all__ = ["each_database"]

WRITES: dict[JobStatus, Callable[[Connection, str], None]] = {
    JobStatus.QUEUED: lambda connection, job_id: enqueue(connection, job_id, "resumed", START),
    JobStatus.PAUSED: lambda connection, job_id: hold(connection, job_id, USER_HOLD, START),
    JobStatus.SUCCEEDED: lambda connection, job_id: end(connection, job_id, JobStatus.SUCCEEDED, START),
    JobStatus.FAILED: lambda connection, job_id: end(connection, job_id, JobStatus.FAILED, START, error={"code": "x"}),
    JobStatus.CANCELLED: lambda connection, job_id: end(connection, job_id, JobStatus.CANCELLED, START),
}
PAIRS = [(source, target) for source in JobStatus for target in WRITES]


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda status: status.value)
def test_status_is_written_only_where_the_state_machine_allows_it(
    database: Database, source: JobStatus, target: JobStatus
) -> None:
    job_id = add_job(database)
    with database.write() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(status=source))
    before = stored_rows(database)
    write = partial(WRITES[target], job_id=job_id)
    if target in TRANSITIONS[source]:
        with database.write() as connection:
            write(connection)
        assert read_job(database, job_id).status is target
    else:
        with pytest.raises(AssertionError, match=f"{job_id} cannot become {target}"), database.write() as connection:
            write(connection)
        assert stored_rows(database) == before
