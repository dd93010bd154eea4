"""Base models requested for chats, and the processes that have them loaded.

A row is a directory entry, not a lease: a process is alive if its socket answers. Functions take the caller's
transaction.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from qlora_service.domain.jobs import JobStatus, StopRequest
from qlora_service.store.jobs import append_event, claimable
from qlora_service.store.lease_clock import LeaseClock, lease_clock
from qlora_service.store.tables import inference, jobs
from qlora_service.store.upsert import insert

REQUEST_LIFETIME_S = 5.0
"""Lifetime of a request; a waiting client renews it"""


@dataclass(frozen=True)
class LoadedBase:
    """A base model, as a process that answers chats has it loaded."""

    base_model: str
    quantization: str
    """`specs.Quantization` as JSON"""


@dataclass(frozen=True)
class JobAhead:
    """A job ahead of a chat: running, or queued."""

    id: str
    project: str
    status: JobStatus
    eta_s: float | None


def request_base(connection: Connection, base: LoadedBase, leases: LeaseClock = lease_clock) -> None:
    """Request the base for a waiting client, or renew the request."""
    name, now = leases(connection)
    row = insert(connection, inference).values(**vars(base), asked_at=now, asked_clock=name)
    connection.execute(
        row.on_conflict_do_update(
            index_elements=["base_model", "quantization"],
            set_={"asked_at": row.excluded.asked_at, "asked_clock": row.excluded.asked_clock},
        )
    )


def socket_of(connection: Connection, base: LoadedBase) -> str | None:
    """Socket of the process that has loaded the base, or is loading it; None without one."""
    return connection.execute(sa.select(inference.c.socket).where(*_is(base))).scalar_one_or_none()


def another_is_loaded(connection: Connection, base: LoadedBase) -> bool:
    """Whether a process has another base loaded."""
    query = sa.select(inference.c.socket).where(inference.c.socket.is_not(None), sa.not_(sa.and_(*_is(base))))
    return connection.execute(query.limit(1)).one_or_none() is not None


def requested_base(connection: Connection, worker: str, leases: LeaseClock = lease_clock) -> LoadedBase | None:
    """The longest requested base that no process but the caller's own (`worker`) has."""
    free = sa.or_(inference.c.worker.is_(None), inference.c.worker == worker)
    query = sa.select(inference.c.base_model, inference.c.quantization).where(free, _is_wanted(connection, leases))
    row = connection.execute(query.order_by(inference.c.asked_at).limit(1)).one_or_none()
    return None if row is None else LoadedBase(*row)


def another_is_requested(connection: Connection, leases: LeaseClock = lease_clock) -> bool:
    """Whether a base is requested that no process has."""
    query = sa.select(inference.c.base_model).where(inference.c.worker.is_(None), _is_wanted(connection, leases))
    return connection.execute(query.limit(1)).one_or_none() is not None


def assign_base(connection: Connection, base: LoadedBase, worker: str, socket: str) -> bool:
    """Assign the base to the worker, which loads it; False if another worker has it."""
    free = sa.or_(inference.c.worker.is_(None), inference.c.worker == worker)
    statement = sa.update(inference).where(*_is(base), free).values(worker=worker, socket=socket)
    return connection.execute(statement.returning(inference.c.worker)).one_or_none() is not None


def release_base(connection: Connection, worker: str) -> None:
    """Record that the worker has no base loaded."""
    connection.execute(sa.update(inference).where(inference.c.worker == worker).values(worker=None, socket=None))


def forget_socket(connection: Connection, socket: str) -> None:
    """Remove the socket of a process that was killed together with its worker."""
    connection.execute(sa.update(inference).where(inference.c.socket == socket).values(worker=None, socket=None))


def job_waits(connection: Connection, max_running: int | None) -> bool:
    """Whether a job could be claimed now; `max_running` bounds the running jobs of one project."""
    return connection.execute(claimable(max_running).limit(1)).one_or_none() is not None


def job_ahead(connection: Connection) -> JobAhead | None:
    """The running job with the smallest ETA, else the first queued one."""
    columns = (jobs.c.id, jobs.c.project, jobs.c.status, jobs.c.eta_s)
    running = sa.select(*columns).where(jobs.c.status == JobStatus.RUNNING).order_by(jobs.c.eta_s.nulls_last())
    queued = sa.select(*columns).where(jobs.c.status == JobStatus.QUEUED).order_by(jobs.c.priority.desc(), jobs.c.id)
    for query in (running, queued):
        if (row := connection.execute(query.limit(1)).one_or_none()) is not None:
            return JobAhead(row.id, row.project, JobStatus(row.status), row.eta_s)
    return None


def request_preemption(connection: Connection, job_id: str, token: int, now: datetime) -> bool:
    """Request the preemption of a running attempt for a chat; whether it was requested.

    Not while any job is stopping: its slot will be free.
    """
    stopping = sa.select(jobs.c.id).where(jobs.c.status == JobStatus.RUNNING, jobs.c.stop_request.is_not(None))
    if connection.execute(stopping.limit(1)).one_or_none() is not None:
        return False
    running = (jobs.c.id == job_id, jobs.c.attempt == token, jobs.c.status == JobStatus.RUNNING)
    asked = sa.update(jobs).where(*running, jobs.c.stop_request.is_(None)).values(stop_request=StopRequest.PREEMPT)
    if connection.execute(asked.returning(jobs.c.id)).one_or_none() is None:
        return False
    message = "a chat is waiting: the job is preempted, and resumes afterwards"
    append_event(connection, job_id, now, "log", {"message": message})
    return True


def completed_steps(connection: Connection, job_id: str, token: int) -> int:
    """Completed steps of the attempt; 0 if it is not the latest."""
    query = sa.select(jobs.c.step).where(jobs.c.id == job_id, jobs.c.attempt == token)
    return connection.execute(query).scalar_one_or_none() or 0


def _is_wanted(connection: Connection, leases: LeaseClock) -> sa.ColumnElement[bool]:
    name, now = leases(connection)
    return sa.and_(inference.c.asked_clock == name, inference.c.asked_at > now - REQUEST_LIFETIME_S)


def _is(base: LoadedBase) -> tuple[sa.ColumnElement[bool], ...]:
    return tuple(inference.c[name] == value for name, value in vars(base).items())
