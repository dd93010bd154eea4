"""Which queued job is claimed next, and which running one is preempted. Functions take the caller's transaction."""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.engine import Connection

from qlora_service.domain.jobs import JobStatus
from qlora_service.models.base.needed_base import NeededBase, may_change_base
from qlora_service.specs import JobSpec
from qlora_service.store.jobs import claimable, may_run_more
from qlora_service.store.tables import jobs

MAX_OVERTAKEN = 3
"""Younger jobs that may be claimed before a job because their base was loaded."""
LOOK_AHEAD = 64
"""Jobs at the front of the queue that are searched for one on the loaded base: a bound on a claim's work."""
CLAIM_LOCK = 0x716C6F7261  # "qlora", for pg_advisory_xact_lock


def next_job(connection: Connection, max_running: int | None, warm: NeededBase | None) -> str | sa.ScalarSelect[str]:
    """The id of the job to claim, locked: by priority, then by age.

    Within a priority, jobs on the loaded base `warm` come first, but no job is overtaken more than `MAX_OVERTAKEN`
    times. `max_running` bounds the running jobs of one project.
    """
    if connection.dialect.name == "postgresql":
        # Two concurrent claims would count the same running jobs, and the same jobs as overtaken.
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(CLAIM_LOCK)))
    overtaker = None if warm is None else _lock_overtaker(connection, max_running, warm)
    if overtaker is not None:
        return overtaker
    head = claimable(max_running).order_by(jobs.c.priority.desc(), jobs.c.id).limit(1)
    return head.with_for_update(skip_locked=True).scalar_subquery()


def find_victim(
    connection: Connection, workers: Collection[str], max_running: int | None, *, slot_is_free: bool
) -> str | None:
    """The id of the job of `workers` with the lowest priority, if one with a higher priority is queued for its slot.

    None while one of the jobs is stopping: its slot will be free. With a free slot, only a project that has as many
    jobs running as it may preempts, and one of its own.
    """
    running = connection.execute(
        sa.select(jobs.c.id, jobs.c.priority, jobs.c.project, jobs.c.stop_request)
        .where(jobs.c.status == JobStatus.RUNNING, jobs.c.worker.in_(workers))
        .order_by(jobs.c.priority, jobs.c.id.desc())
    ).all()
    if not running or any(row.stop_request for row in running):
        return None
    urgent = connection.execute(
        sa.select(jobs.c.project, sa.func.max(jobs.c.priority).label("priority"))
        .where(jobs.c.status == JobStatus.QUEUED, jobs.c.priority > running[0].priority)
        .group_by(jobs.c.project)
    ).all()
    for candidate in sorted(urgent, key=lambda row: -row.priority):
        own_only = not may_run_more(connection, candidate.project, max_running)
        if slot_is_free and not own_only:
            continue  # the free slot takes it
        for row in running:
            if row.priority < candidate.priority and (not own_only or row.project == candidate.project):
                return str(row.id)
    return None


def runs_on(spec: object, warm: NeededBase) -> bool:
    """Whether a job with this stored spec, on the same weights, can use the loaded base."""
    try:
        wanted = JobSpec.model_validate(spec, extra="ignore")
    except ValidationError:
        return False  # the claim of that job reports it
    return NeededBase.of(wanted, warm.weights_sha256) == warm and not may_change_base(wanted.adapter)


def _lock_overtaker(connection: Connection, max_running: int | None, warm: NeededBase) -> str | None:
    """The id of the job that overtakes, locked; every job it overtakes is counted as overtaken once more."""
    job_id = _find_overtaker(connection, max_running, warm)
    if job_id is None:
        return None
    query = sa.select(jobs.c.priority).where(jobs.c.id == job_id, jobs.c.status == JobStatus.QUEUED)
    row = connection.execute(query.with_for_update(skip_locked=True)).one_or_none()
    if row is None:  # another transaction is changing it
        return None
    older = claimable(max_running).where(jobs.c.priority == row.priority, jobs.c.id < job_id)
    connection.execute(sa.update(jobs).where(jobs.c.id.in_(older)).values(overtaken=jobs.c.overtaken + 1))
    return job_id


def _find_overtaker(connection: Connection, max_running: int | None, warm: NeededBase) -> str | None:
    """The id of the first job on the loaded base that may be claimed now; None when the head of the queue is next.

    It has the head's priority, and every job before it may be overtaken once more.
    """
    spec = sa.case((jobs.c.base_weights_sha256 == warm.weights_sha256, jobs.c.spec))
    columns = jobs.c.id, jobs.c.priority, jobs.c.overtaken, sa.type_coerce(spec, sa.JSON).label("spec")
    queue = claimable(max_running).with_only_columns(*columns).order_by(jobs.c.priority.desc(), jobs.c.id)
    head_priority: int | None = None
    for row in connection.execute(queue.limit(LOOK_AHEAD)):
        head_priority = row.priority if head_priority is None else head_priority
        if row.priority < head_priority:
            return None
        if row.spec is not None and runs_on(row.spec, warm):
            return str(row.id)
        if row.overtaken >= MAX_OVERTAKEN:
            return None
    return None
