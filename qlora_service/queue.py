"""The queue: claim, report, finish, requeue. Every write of a running attempt carries its fencing token.

The token is the attempt's number: each claim adds one, so an older claim's writes find no row
(`WHERE id = ? AND attempt = ? AND status = 'running'`) and raise `ClaimLost`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.engine import Connection

from qlora_service.errors import ClaimLost, Conflict, JobFailed
from qlora_service.jobs import FailureReason, Job, JobStatus
from qlora_service.store.database import Database
from qlora_service.store.jobs import append_event, get_job, job_from_row
from qlora_service.store.tables import jobs

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Claim:
    """The right to run one attempt of one job, until a later claim exists."""

    job_id: str
    token: int

    @property
    def name(self) -> str:
        """What an attempt's scratch directory and log are called."""
        return f"{self.job_id}-{self.token}"


@dataclass(frozen=True)
class Progress:
    """What a running attempt tells about itself; None leaves the stored value as it is."""

    phase: str | None = None
    step: int | None = None
    total_steps: int | None = None
    eta_s: float | None = None
    metrics: dict[str, Any] | None = None


class Queue:
    def __init__(self, database: Database, *, lease_s: float, clock: Clock = utc_now) -> None:
        self._database = database
        self._lease = timedelta(seconds=lease_s)
        self._clock = clock

    def claim(self, worker: str) -> tuple[Claim, Job] | None:
        """The most urgent queued job, now running under a new token; None when nothing is queued."""
        now = self._clock()
        head = (
            sa.select(jobs.c.id)
            .where(jobs.c.status == JobStatus.QUEUED)
            .order_by(jobs.c.priority.desc(), jobs.c.id)
            .limit(1)
            .with_for_update(skip_locked=True)
            .scalar_subquery()
        )
        statement = (
            sa.update(jobs)
            .where(jobs.c.id == head, jobs.c.status == JobStatus.QUEUED)
            .values(
                status=JobStatus.RUNNING,
                attempt=jobs.c.attempt + 1,
                worker=worker,
                lease_expires_at=now + self._lease,
                started_at=sa.func.coalesce(jobs.c.started_at, sa.bindparam("now", now, jobs.c.started_at.type)),
                step=0,
                total_steps=None,
                eta_s=None,
                phase="starting",
                metrics={},
            )
            .returning(jobs)
        )
        with self._database.write() as connection:
            row = connection.execute(statement).one_or_none()
            if row is None:
                return None
            try:
                job = job_from_row(row)
            except ValidationError as error:
                # Left in the queue, it would be claimed and dropped for ever.
                self._fail_unreadable(connection, row.id, now, error)
                return None
            data = {"status": JobStatus.RUNNING, "attempt": job.attempt, "worker": worker}
            append_event(connection, job.id, now, "status", data)
            return Claim(job.id, job.attempt), job

    def renew(self, claim: Claim) -> bool:
        """Extend the lease; True when the attempt should stop because a cancel was requested.

        Raises:
            ClaimLost: a newer claim owns the job, or it is no longer running.
        """
        with self._database.write() as connection:
            return self._fenced(connection, claim, {})

    def report(self, claim: Claim, progress: Progress, event: tuple[str, dict[str, Any]] | None = None) -> bool:
        """Store progress and, with it, an event; renews the lease. Answers and raises as `renew` does."""
        values = {key: value for key, value in vars(progress).items() if value is not None}
        with self._database.write() as connection:
            cancel = self._fenced(connection, claim, values)
            if event is not None:
                append_event(connection, claim.job_id, self._clock(), *event)
            return cancel

    def succeed(self, claim: Claim, result: dict[str, Any]) -> None:
        self._finish(claim, JobStatus.SUCCEEDED, {"result": result, "eta_s": 0.0})

    def fail(self, claim: Claim, error: dict[str, Any]) -> None:
        self._finish(claim, JobStatus.FAILED, {"error": error, "eta_s": None})

    def cancelled(self, claim: Claim) -> None:
        self._finish(claim, JobStatus.CANCELLED, {"eta_s": None})

    def release(self, claim: Claim, why: str) -> None:
        """Give a running job back to the queue, to be claimed again from the start."""
        with self._database.write() as connection:
            cancel = self._fenced(connection, claim, _REQUEUED)
            self._after_requeue(connection, claim.job_id, cancel, why)

    def requeue_lost(self) -> list[str]:
        """Return jobs whose lease has expired to the queue; their ids."""
        now = self._clock()
        lost = (
            sa.update(jobs)
            .where(jobs.c.status == JobStatus.RUNNING, jobs.c.lease_expires_at < now)
            .values(_REQUEUED)
            .returning(jobs.c.id, jobs.c.cancel_requested)
        )
        with self._database.write() as connection:
            rows = connection.execute(lost).all()
            for job_id, cancel in rows:
                self._after_requeue(connection, job_id, cancel, "its worker did not renew the claim")
            return [job_id for job_id, _ in rows]

    def request_cancel(self, job_id: str) -> Job:
        """Cancel at once if queued, at the next step boundary if running; the job as it is then.

        Raises:
            NotFound: no such job.
            Conflict: it has ended otherwise.
        """
        now = self._clock()
        with self._database.write() as connection:
            job = get_job(connection, job_id)
            if job.status is JobStatus.QUEUED:
                self._cancel_queued(connection, job_id, now)
            elif job.status is JobStatus.RUNNING:
                if not job.cancel_requested:
                    connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(cancel_requested=True))
                    append_event(connection, job_id, now, "log", {"message": "cancel requested"})
            elif job.status is not JobStatus.CANCELLED:
                raise Conflict(f"job {job_id} has {job.status} already: there is nothing left to cancel")
            return get_job(connection, job_id)

    def cancel_requested(self, claim: Claim) -> bool:
        """Whether the claimed job is to be cancelled."""
        query = sa.select(jobs.c.cancel_requested).where(jobs.c.id == claim.job_id, jobs.c.attempt == claim.token)
        with self._database.read() as connection:
            return bool(connection.execute(query).scalar_one_or_none())

    def is_running(self, claim: Claim) -> bool:
        """Whether the claim still owns its job."""
        query = sa.select(jobs.c.id).where(*_owned(claim))
        with self._database.read() as connection:
            return connection.execute(query).one_or_none() is not None

    def _fail_unreadable(self, connection: Connection, job_id: str, now: datetime, error: ValidationError) -> None:
        failure = JobFailed(
            f"the stored configuration of job {job_id} is not one that this version understands: post it again "
            f"({error.error_count()} faults)",
            reason=FailureReason.INVALID_INPUT,
        ).as_dict()
        values = {"status": JobStatus.FAILED, "finished_at": now, "phase": None, "lease_expires_at": None}
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(error=failure, **values))
        append_event(connection, job_id, now, "status", {"status": JobStatus.FAILED, "error": failure})

    def _finish(self, claim: Claim, status: JobStatus, values: dict[str, Any]) -> None:
        now = self._clock()
        with self._database.write() as connection:
            ended = {"status": status, "finished_at": now, "phase": None, "lease_expires_at": None}
            self._fenced(connection, claim, {**values, **ended})
            append_event(connection, claim.job_id, now, "status", {"status": status, **_public(values)})

    def _fenced(self, connection: Connection, claim: Claim, values: dict[str, Any]) -> bool:
        """Update the claimed row; returns its cancel flag. Raises: ClaimLost."""
        statement = (
            sa.update(jobs)
            .where(*_owned(claim))
            .values({"lease_expires_at": self._clock() + self._lease, **values})
            .returning(jobs.c.cancel_requested)
        )
        row = connection.execute(statement).one_or_none()
        if row is None:
            raise ClaimLost(f"attempt {claim.token} of job {claim.job_id} no longer owns it: nothing was written")
        return bool(row.cancel_requested)

    def _after_requeue(self, connection: Connection, job_id: str, cancel: bool, why: str) -> None:
        now = self._clock()
        append_event(connection, job_id, now, "status", {"status": JobStatus.QUEUED, "reason": why})
        if cancel:
            self._cancel_queued(connection, job_id, now)

    def _cancel_queued(self, connection: Connection, job_id: str, now: datetime) -> None:
        values = {"status": JobStatus.CANCELLED, "finished_at": now}
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(values))
        append_event(connection, job_id, now, "status", {"status": JobStatus.CANCELLED})


_REQUEUED: dict[str, Any] = {
    "status": JobStatus.QUEUED,
    "worker": None,
    "lease_expires_at": None,
    "phase": None,
    "step": 0,
    "eta_s": None,
    "metrics": {},
}


def _owned(claim: Claim) -> tuple[sa.ColumnElement[bool], ...]:
    return jobs.c.id == claim.job_id, jobs.c.attempt == claim.token, jobs.c.status == JobStatus.RUNNING


def _public(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key == "error"}
