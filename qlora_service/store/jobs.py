"""Jobs and their events as rows. Functions take the caller's transaction."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from qlora_service.errors import NotFound
from qlora_service.jobs import Job, JobEvent, JobStatus, StopRequest
from qlora_service.specs import JobSpec
from qlora_service.store.tables import events, jobs


def insert_job(
    connection: Connection,
    job_id: str,
    project: str,
    spec: JobSpec,
    dataset_id: str,
    base_sha256: str,
    now: datetime,
) -> None:
    connection.execute(
        jobs.insert().values(
            id=job_id,
            project=project,
            status=JobStatus.QUEUED,
            spec=spec.model_dump(mode="json"),
            base_model=spec.base_model,
            base_weights_sha256=base_sha256,
            dataset_id=dataset_id,
            priority=spec.priority,
            created_at=now,
            metrics={},
        )
    )
    append_event(connection, job_id, now, "status", {"status": JobStatus.QUEUED})


def get_job(connection: Connection, job_id: str, *, project: str | None = None, lock: bool = False) -> Job:
    """The job; with `lock`, nobody else changes it before the transaction ends.

    Raises:
        NotFound: there is none, or it belongs to another project than `project`.
    """
    query = sa.select(jobs).where(jobs.c.id == job_id)
    if project is not None:
        query = query.where(jobs.c.project == project)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise NotFound(f"there is no job {job_id!r}; GET /jobs lists them", location="job_id")
    return job_from_row(row)


def list_jobs(
    connection: Connection,
    *,
    project: str,
    status: JobStatus | None = None,
    base_model: str | None = None,
    before: str | None = None,
    limit: int,
) -> list[Job]:
    """Up to `limit` jobs, newest first, older than the job id `before`."""
    query = sa.select(jobs).where(jobs.c.project == project).order_by(jobs.c.id.desc()).limit(limit)
    if status is not None:
        query = query.where(jobs.c.status == status)
    if base_model is not None:
        query = query.where(jobs.c.base_model == base_model)
    if before is not None:
        query = query.where(jobs.c.id < before)
    return [job_from_row(row) for row in connection.execute(query)]


def count_ahead(connection: Connection, job: Job) -> int:
    """Queued jobs that will be claimed before `job`."""
    ahead = sa.or_(
        jobs.c.priority > job.spec.priority,
        sa.and_(jobs.c.priority == job.spec.priority, jobs.c.id < job.id),
    )
    query = sa.select(sa.func.count()).where(jobs.c.status == JobStatus.QUEUED, ahead)
    return connection.execute(query).scalar_one()


def count_queued(connection: Connection, project: str) -> int:
    """How many jobs of the project wait; nobody else adds one before the transaction ends."""
    if connection.dialect.name == "postgresql":
        # Two submissions at once would count the same jobs. On SQLite writers take turns anyway.
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(f"queued {project}"))))
    where = (jobs.c.status == JobStatus.QUEUED, jobs.c.project == project)
    return connection.execute(sa.select(sa.func.count()).where(*where)).scalar_one()


def append_event(connection: Connection, job_id: str, now: datetime, type_: str, data: dict[str, Any]) -> None:
    """Add an event to a job whose row this transaction has written or locked.

    So a job's events are numbered in the order of their commits, and a reader that has seen one missed none before it.
    """
    connection.execute(events.insert().values(job_id=job_id, at=now, type=type_, data=data))


def events_after(
    connection: Connection,
    job_id: str,
    seq: int = 0,
    *,
    types: Sequence[str] | None = None,
    limit: int | None = None,
) -> list[JobEvent]:
    """Events of a job with a sequence number above `seq`, oldest first."""
    query = sa.select(events).where(events.c.job_id == job_id, events.c.seq > seq).order_by(events.c.seq)
    if types is not None:
        query = query.where(events.c.type.in_(types))
    return [JobEvent(**row._mapping) for row in connection.execute(query.limit(limit))]


def job_from_row(row: Row[Any]) -> Job:
    return Job(
        id=row.id,
        status=JobStatus(row.status),
        project=row.project,
        # A spec that was stored by an older version may have fields that are gone.
        spec=JobSpec.model_validate(row.spec, extra="ignore"),
        base_weights_sha256=row.base_weights_sha256,
        dataset_id=row.dataset_id,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        attempt=row.attempt,
        stop_request=None if row.stop_request is None else StopRequest(row.stop_request),
        hold=row.hold,
        plan=row.plan,
        checkpoint_step=row.checkpoint_step,
        deaths=row.deaths,
        step=row.step,
        total_steps=row.total_steps,
        eta_s=row.eta_s,
        phase=row.phase,
        metrics=row.metrics,
        error=row.error,
        result=row.result,
        withdrawn_at=row.withdrawn_at,
    )
