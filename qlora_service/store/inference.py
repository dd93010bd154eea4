"""Who waits for a base to chat with, and which process has it loaded, as rows. Functions take the caller's transaction.

A row is an entry in a directory, not a lease: whether a process is there is told by whether its socket answers.
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

WANTED_S = 5.0
"""Who waits says so again before this is over."""


@dataclass(frozen=True)
class LoadedBase:
    """What a process that answers chats has on its device; adapters come and go on it."""

    base_model: str
    quantization: str
    """`specs.Quantization` as JSON"""


@dataclass(frozen=True)
class Holder:
    """A job that has a slot, or waits for one."""

    id: str
    project: str
    status: JobStatus
    eta_s: float | None


def ask_for(connection: Connection, base: LoadedBase, leases: LeaseClock = lease_clock) -> None:
    """Note that somebody waits for the base."""
    name, now = leases(connection)
    row = insert(connection, inference).values(**vars(base), asked_at=now, asked_clock=name)
    connection.execute(
        row.on_conflict_do_update(
            index_elements=["base_model", "quantization"],
            set_={"asked_at": row.excluded.asked_at, "asked_clock": row.excluded.asked_clock},
        )
    )


def socket_of(connection: Connection, base: LoadedBase) -> str | None:
    """Where the process listens that has the base, or is about to have it."""
    return connection.execute(sa.select(inference.c.socket).where(*_is(base))).scalar_one_or_none()


def another_is_loaded(connection: Connection, base: LoadedBase) -> bool:
    """Whether a process has something else loaded."""
    query = sa.select(inference.c.socket).where(inference.c.socket.is_not(None), sa.not_(sa.and_(*_is(base))))
    return connection.execute(query.limit(1)).one_or_none() is not None


def wanted_base(connection: Connection, worker: str, leases: LeaseClock = lease_clock) -> LoadedBase | None:
    """A base that somebody waits for and no process has; `worker`, who asks, has none."""
    free = sa.or_(inference.c.worker.is_(None), inference.c.worker == worker)
    query = sa.select(inference.c.base_model, inference.c.quantization).where(free, _is_wanted(connection, leases))
    row = connection.execute(query.order_by(inference.c.asked_at).limit(1)).one_or_none()
    return None if row is None else LoadedBase(*row)


def another_is_wanted(connection: Connection, leases: LeaseClock = lease_clock) -> bool:
    """Whether somebody waits for a base that no process has."""
    query = sa.select(inference.c.base_model).where(inference.c.worker.is_(None), _is_wanted(connection, leases))
    return connection.execute(query.limit(1)).one_or_none() is not None


def take(connection: Connection, base: LoadedBase, worker: str, socket: str) -> bool:
    """Whether the base is now the worker's to load; False when another was faster."""
    free = sa.or_(inference.c.worker.is_(None), inference.c.worker == worker)
    statement = sa.update(inference).where(*_is(base), free).values(worker=worker, socket=socket)
    return connection.execute(statement.returning(inference.c.worker)).one_or_none() is not None


def give_up(connection: Connection, worker: str) -> None:
    """Note that the worker has no base loaded any more."""
    connection.execute(sa.update(inference).where(inference.c.worker == worker).values(worker=None, socket=None))


def forget(connection: Connection, socket: str) -> None:
    """Note that nobody listens there any more: whoever did was killed, and its worker with it."""
    connection.execute(sa.update(inference).where(inference.c.socket == socket).values(worker=None, socket=None))


def job_waits(connection: Connection, max_running: int | None) -> bool:
    """Whether a job could be claimed now; `max_running` is how many of one project may run at a time."""
    return connection.execute(claimable(max_running).limit(1)).one_or_none() is not None


def job_ahead(connection: Connection) -> Holder | None:
    """The running job that will end first, else the first queued one."""
    columns = (jobs.c.id, jobs.c.project, jobs.c.status, jobs.c.eta_s)
    running = sa.select(*columns).where(jobs.c.status == JobStatus.RUNNING).order_by(jobs.c.eta_s.nulls_last())
    queued = sa.select(*columns).where(jobs.c.status == JobStatus.QUEUED).order_by(jobs.c.priority.desc(), jobs.c.id)
    for query in (running, queued):
        if (row := connection.execute(query.limit(1)).one_or_none()) is not None:
            return Holder(row.id, row.project, JobStatus(row.status), row.eta_s)
    return None


def ask_to_make_way(connection: Connection, job_id: str, token: int, now: datetime) -> bool:
    """Whether a running attempt was asked to go back to the queue at its next step boundary.

    Not while any job is stopping, for whatever reason: a slot will be free.
    """
    stopping = sa.select(jobs.c.id).where(jobs.c.status == JobStatus.RUNNING, jobs.c.stop_request.is_not(None))
    if connection.execute(stopping.limit(1)).one_or_none() is not None:
        return False
    mine = (jobs.c.id == job_id, jobs.c.attempt == token, jobs.c.status == JobStatus.RUNNING)
    asked = sa.update(jobs).where(*mine, jobs.c.stop_request.is_(None)).values(stop_request=StopRequest.PREEMPT)
    if connection.execute(asked.returning(jobs.c.id)).one_or_none() is None:
        return False
    message = "somebody waits to chat: it will make room, and go on afterwards"
    append_event(connection, job_id, now, "log", {"message": message})
    return True


def steps_done(connection: Connection, job_id: str, token: int) -> int:
    """Steps that an attempt has done; 0 when it is not the running one."""
    query = sa.select(jobs.c.step).where(jobs.c.id == job_id, jobs.c.attempt == token)
    return connection.execute(query).scalar_one_or_none() or 0


def _is_wanted(connection: Connection, leases: LeaseClock) -> sa.ColumnElement[bool]:
    name, now = leases(connection)
    return sa.and_(inference.c.asked_clock == name, inference.c.asked_at > now - WANTED_S)


def _is(base: LoadedBase) -> tuple[sa.ColumnElement[bool], ...]:
    return tuple(inference.c[name] == value for name, value in vars(base).items())
