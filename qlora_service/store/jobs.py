"""Rows of jobs and their events. Functions take the caller's transaction."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.engine import Connection, Row

from qlora_service.domain.jobs import Job, JobEvent, JobStatus, StopRequest
from qlora_service.errors import NotFound
from qlora_service.specs import JobSpec
from qlora_service.store.pages import PageRequest
from qlora_service.store.tables import events, jobs

EVENT_LOCK = 0x716C6F726165  # "qlorae", for pg_advisory_xact_lock


def insert_job(
    connection: Connection,
    job_id: str,
    project: str,
    spec: JobSpec,
    dataset_id: str,
    base_sha256: str,
    now: datetime,
    *,
    forecast: dict[str, Any] | None = None,
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
            forecast=forecast,
            metrics={},
        )
    )
    append_event(connection, job_id, now, "status", {"status": JobStatus.QUEUED})


def add_warnings(connection: Connection, job_id: str, warnings: Sequence[str], now: datetime) -> None:
    """Add the warnings that the job does not have yet, each with an event; this transaction has locked its row."""
    known = connection.execute(sa.select(jobs.c.warnings).where(jobs.c.id == job_id)).scalar_one()
    new = [warning for warning in dict.fromkeys(warnings) if warning not in known]
    if new:
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(warnings=[*known, *new]))
    for warning in new:
        append_event(connection, job_id, now, "warning", {"message": warning})


def get_job(connection: Connection, job_id: str, *, project: str | None = None, lock: bool = False) -> Job:
    """The job; with `lock`, no other transaction changes it before this one ends. Its spec may be `unreadable`.

    Raises:
        NotFound: no such job, or not in `project`.
    """
    query = sa.select(jobs).where(jobs.c.id == job_id)
    if project is not None:
        query = query.where(jobs.c.project == project)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise NotFound(f"there is no job {job_id!r}; GET /jobs lists them", location="job_id")
    return _shown(row)


def list_jobs(
    connection: Connection,
    page: PageRequest,
    *,
    project: str,
    status: JobStatus | None = None,
    base_model: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> list[Job]:
    """A page of the project's jobs, those with an `unreadable` spec among them: their owner may cancel them.

    `metadata` selects jobs with all of these pairs; an empty mapping selects jobs without metadata.
    """
    query = page.of(sa.select(jobs).where(jobs.c.project == project), jobs.c.id)
    if metadata is not None:
        query = query.where(*_has_metadata(connection, metadata))
    if status is not None:
        query = query.where(jobs.c.status == status)
    if base_model is not None:
        query = query.where(jobs.c.base_model == base_model)
    return [_shown(row) for row in connection.execute(query)]


def list_published(connection: Connection, *, project: str, limit: int) -> list[Job]:
    """Up to `limit` jobs whose adapters are available, newest first."""
    published = (jobs.c.status == JobStatus.SUCCEEDED, jobs.c.withdrawn_at.is_(None))
    query = sa.select(jobs).where(jobs.c.project == project, *published).order_by(jobs.c.id.desc()).limit(limit)
    return [_shown(row) for row in connection.execute(query)]


def unfinished_on(connection: Connection, dataset_id: str) -> str | None:
    """The id of an unfinished job that trains or validates on the dataset; None without one."""
    validation = jobs.c.spec["validation"]["dataset_id"].as_string()
    query = sa.select(jobs.c.id).where(
        jobs.c.status.in_([status for status in JobStatus if not status.terminal]),
        sa.or_(jobs.c.dataset_id == dataset_id, validation == dataset_id),
    )
    return connection.execute(query.limit(1)).scalar_one_or_none()


def unfinished_on_base(connection: Connection, base_model: str) -> list[str]:
    """The ids of unfinished jobs on the base model, oldest first."""
    unfinished = jobs.c.status.in_([status for status in JobStatus if not status.terminal])
    query = sa.select(jobs.c.id).where(unfinished, jobs.c.base_model == base_model).order_by(jobs.c.id)
    return list(connection.execute(query).scalars())


def mark_withdrawn(connection: Connection, job_id: str, now: datetime) -> None:
    connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(withdrawn_at=now))


def claimable(max_running: int | None) -> sa.Select[tuple[str]]:
    """The ids of queued jobs whose project has fewer than `max_running` jobs running."""
    query = sa.select(jobs.c.id).where(jobs.c.status == JobStatus.QUEUED)
    if max_running is None:
        return query
    other = jobs.alias()
    running = sa.select(sa.func.count()).where(other.c.status == JobStatus.RUNNING, other.c.project == jobs.c.project)
    return query.where(running.scalar_subquery() < max_running)


def may_run_more(connection: Connection, project: str, max_running: int | None) -> bool:
    """Whether the project has fewer than `max_running` jobs running."""
    if max_running is None:
        return True
    running = sa.select(sa.func.count()).where(jobs.c.status == JobStatus.RUNNING, jobs.c.project == project)
    return connection.execute(running).scalar_one() < max_running


def count_ahead(connection: Connection, job: Job) -> int:
    """Number of queued jobs that are claimed before `job`."""
    ahead = sa.or_(
        jobs.c.priority > job.spec.priority,
        sa.and_(jobs.c.priority == job.spec.priority, jobs.c.id < job.id),
    )
    query = sa.select(sa.func.count()).where(jobs.c.status == JobStatus.QUEUED, ahead)
    return connection.execute(query).scalar_one()


def places_in_queue(connection: Connection, job_ids: Collection[str]) -> dict[str, int]:
    """`count_ahead` of each queued job among `job_ids`, in one query."""
    order = sa.func.row_number().over(order_by=(jobs.c.priority.desc(), jobs.c.id))
    queue = sa.select(jobs.c.id, (order - 1).label("place")).where(jobs.c.status == JobStatus.QUEUED).subquery()
    rows = connection.execute(sa.select(queue).where(queue.c.id.in_(job_ids)))
    return {row.id: row.place for row in rows}


def count_queued(connection: Connection, project: str) -> int:
    """Number of queued jobs of the project; no other transaction adds one before this one ends."""
    if connection.dialect.name == "postgresql":
        # Two concurrent submissions would count the same jobs. SQLite has one writer at a time.
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(f"queued {project}"))))
    where = (jobs.c.status == JobStatus.QUEUED, jobs.c.project == project)
    return connection.execute(sa.select(sa.func.count()).where(*where)).scalar_one()


def append_event(connection: Connection, job_id: str, now: datetime, type_: str, data: dict[str, Any]) -> None:
    """Add an event to a job whose row this transaction has written or locked.

    Events are numbered in the order of their commits: a reader that has seen one has missed none before it.
    """
    if connection.dialect.name == "postgresql":
        # Without the lock a smaller number could be committed after a larger one of another job.
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(EVENT_LOCK)))
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


def events_before(
    connection: Connection, job_id: str, seq: int | None, *, types: Sequence[str], limit: int
) -> list[JobEvent]:
    """Up to `limit` events of a job with a sequence number below `seq`, newest first."""
    query = sa.select(events).where(events.c.job_id == job_id, events.c.type.in_(types))
    if seq is not None:
        query = query.where(events.c.seq < seq)
    rows = connection.execute(query.order_by(events.c.seq.desc()).limit(limit))
    return [JobEvent(**row._mapping) for row in rows]


def project_events_after(
    connection: Connection, project: str, seq: int, *, types: Collection[str] | None, limit: int
) -> list[JobEvent]:
    """Up to `limit` events of the project's jobs with a sequence number above `seq`, oldest first."""
    own = sa.select(events).join(jobs).where(jobs.c.project == project, events.c.seq > seq)
    if types is not None:
        own = own.where(events.c.type.in_(types))
    return [JobEvent(**row._mapping) for row in connection.execute(own.order_by(events.c.seq).limit(limit))]


def tail_events(connection: Connection, seq: int, limit: int) -> list[tuple[str, JobEvent]]:
    """Up to `limit` events above `seq`, oldest first, each with its job's project."""
    # The limit is inside the subquery, so that the work does not grow with the history.
    newest = sa.select(events).where(events.c.seq > seq).order_by(events.c.seq).limit(limit).subquery()
    query = sa.select(jobs.c.project, newest).join(jobs, jobs.c.id == newest.c.job_id).order_by(newest.c.seq)
    return [(project, JobEvent(*event)) for project, *event in connection.execute(query)]


def last_seq(connection: Connection) -> int:
    """Sequence number of the newest event; 0 without any."""
    return connection.execute(sa.select(sa.func.max(events.c.seq))).scalar_one() or 0


def _has_metadata(connection: Connection, wanted: Mapping[str, str]) -> list[sa.ColumnElement[bool]]:
    """Conditions for the metadata pairs. Keys may be any text, so none becomes part of a JSON path."""
    on_postgres = connection.dialect.name == "postgresql"
    if not wanted:
        path = ("metadata",) if on_postgres else ("$.metadata",)
        extract = sa.func.json_extract_path_text if on_postgres else sa.func.json_extract
        return [extract(jobs.c.spec, *path) == "{}"]
    if on_postgres:
        return [sa.func.json_extract_path_text(jobs.c.spec, "metadata", key) == value for key, value in wanted.items()]
    conditions: list[sa.ColumnElement[bool]] = []
    for key, value in wanted.items():
        pair = sa.func.json_each(jobs.c.spec, "$.metadata").table_valued("key", "value")
        conditions.append(sa.exists().select_from(pair).where(pair.c.key == key, pair.c.value == value))
    return conditions


def job_from_row(row: Row[Any]) -> Job:
    """The job, to be run. Raises: ValidationError, when this version cannot read its spec."""
    # extra="ignore": a spec of an older version may have removed fields.
    return _with_spec(row, JobSpec.model_validate(_with_former_defaults(row.spec), extra="ignore"))


def _shown(row: Row[Any]) -> Job:
    """The job, to be shown and cancelled; with an unreadable spec, `unreadable` is set."""
    try:
        return job_from_row(row)
    except ValidationError as error:
        stored = row.spec if isinstance(row.spec, dict) else {}
        name, metadata = stored.get("name"), stored.get("metadata")
        remains = JobSpec.model_construct(
            base_model=row.base_model,
            priority=row.priority,
            name=name if isinstance(name, str) else None,
            metadata={key: str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {},
        )
        reason = (
            f"the stored configuration of job {row.id} cannot be read by this version "
            f"({error.error_count()} faults): post it again to run it"
        )
        return replace(_with_spec(row, remains), unreadable=reason)


def _with_former_defaults(spec: Any) -> Any:
    """The stored spec; without a prompt format it is of a version that rendered text prompts as plain text."""
    training = spec.get("training") if isinstance(spec, dict) else None
    return {**spec, "training": {"prompt_format": "plain", **training}} if isinstance(training, dict) else spec


def _with_spec(row: Row[Any], spec: JobSpec) -> Job:
    return Job(
        id=row.id,
        status=JobStatus(row.status),
        project=row.project,
        spec=spec,
        base_weights_sha256=row.base_weights_sha256,
        dataset_id=row.dataset_id,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        attempt=row.attempt,
        stop_request=None if row.stop_request is None else StopRequest(row.stop_request),
        hold=row.hold,
        plan=row.plan,
        forecast=row.forecast,
        measured=row.measured,
        checkpoint_step=row.checkpoint_step,
        deaths=row.deaths,
        step=row.step,
        total_steps=row.total_steps,
        eta_s=row.eta_s,
        phase=row.phase,
        metrics=row.metrics,
        warnings=row.warnings,
        error=row.error,
        result=row.result,
        withdrawn_at=row.withdrawn_at,
    )
