"""The queue as workers use it: claim a job, renew the claim, report progress, finish; requeue or fail dead attempts.

Every write about a running attempt is fenced by its token, the attempt's number: each claim adds one, so the writes of
an older claim find no row (`WHERE id = ? AND attempt = ? AND status = 'running'`) and raise `ClaimLost`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.engine import Connection, Row

from qlora_service.domain.clock import Clock, utc_now
from qlora_service.domain.jobs import FailureReason, HoldReason, Job, JobStatus, StopRequest, sources_of
from qlora_service.errors import ClaimLost, JobFailed
from qlora_service.models.base.needed_base import NeededBase
from qlora_service.queue.claim import Claim, Progress
from qlora_service.queue.requests import set_stop_request
from qlora_service.queue.scheduling import find_victim, next_job
from qlora_service.queue.transitions import USER_HOLD, end, enqueue, hold
from qlora_service.store.database import Database
from qlora_service.store.jobs import add_warnings, append_event, get_job, job_from_row
from qlora_service.store.lease_clock import LeaseClock, lease_clock
from qlora_service.store.tables import jobs

MAX_DEATHS = 3
"""Attempts in a row that may die without a new checkpoint before the job fails."""


class Queue:
    """Safe to share between threads; several workers may work on one database."""

    def __init__(
        self,
        database: Database,
        *,
        lease_s: float,
        clock: Clock = utc_now,
        leases: LeaseClock = lease_clock,
        max_running: int | None = None,
        max_deaths: int = MAX_DEATHS,
    ) -> None:
        """`max_running` bounds the running jobs of one project; None for no bound."""
        self._database = database
        self._lease_s = lease_s
        self._clock = clock
        self._leases = leases
        self._max_running = max_running
        self._max_deaths = max_deaths

    def claim(self, worker: str, warm: NeededBase | None = None) -> tuple[Claim, Job] | None:
        """The next queued job, now running under a new token; None when nothing is queued.

        `warm` is the base that the worker has loaded; see `scheduling.next_job`.
        """
        now = self._clock()
        with self._database.write() as connection:
            statement = (
                sa.update(jobs)
                .where(
                    jobs.c.id == next_job(connection, self._max_running, warm),
                    jobs.c.status.in_(sources_of(JobStatus.RUNNING)),
                )
                .values(
                    status=JobStatus.RUNNING,
                    attempt=jobs.c.attempt + 1,
                    worker=worker,
                    started_at=sa.func.coalesce(jobs.c.started_at, sa.bindparam("now", now, jobs.c.started_at.type)),
                    step=jobs.c.checkpoint_step,
                    total_steps=None,
                    eta_s=None,
                    phase="starting",
                    metrics={},
                    **self._renewed(connection),
                )
                .returning(jobs)
            )
            row = connection.execute(statement).one_or_none()
            if row is None:
                return None
            try:
                job = job_from_row(row)
            except ValidationError as error:
                # Left in the queue, it would be claimed and dropped for ever.
                end(connection, row.id, JobStatus.FAILED, now, error=_unreadable(row.id, error))
                return None
            data = {"status": JobStatus.RUNNING, "attempt": job.attempt, "worker": worker}
            append_event(connection, job.id, now, "status", data)
            return Claim(job.id, job.attempt), job

    def renew(self, claim: Claim) -> StopRequest | None:
        """Extends the lease; returns what the attempt is asked to do at its next step boundary.

        Raises:
            ClaimLost: a newer claim owns the job, or it is no longer running.
        """
        with self._database.write() as connection:
            return _stop_request(self._fenced(connection, claim, self._renewed(connection)))

    def report(
        self, claim: Claim, progress: Progress, event: tuple[str, dict[str, Any]] | None = None
    ) -> StopRequest | None:
        """Stores progress and an event, and renews the lease. Returns and raises as `renew` does."""
        values = {key: value for key, value in vars(progress).items() if value is not None}
        with self._database.write() as connection:
            if progress.checkpoint_step is not None:
                before = self._fenced(connection, claim, {}).checkpoint_step
                if progress.checkpoint_step > before:
                    values["deaths"] = []
            row = self._fenced(connection, claim, values | self._renewed(connection))
            if event is not None:
                append_event(connection, claim.job_id, self._clock(), *event)
            return _stop_request(row)

    def warn(self, claim: Claim, warnings: Sequence[str]) -> None:
        """Adds warnings to the job, with an event for each that is new. Raises: ClaimLost."""
        with self._database.write() as connection:
            self._fenced(connection, claim, {})
            add_warnings(connection, claim.job_id, warnings, self._clock())

    def succeed(self, claim: Claim, result: dict[str, Any]) -> None:
        with self._database.write() as connection:
            self._fenced(connection, claim, {"result": result})
            end(connection, claim.job_id, JobStatus.SUCCEEDED, self._clock(), eta_s=0.0)

    def fail(self, claim: Claim, error: dict[str, Any]) -> None:
        with self._database.write() as connection:
            self._fenced(connection, claim, {})
            end(connection, claim.job_id, JobStatus.FAILED, self._clock(), error=error)

    def cancelled(self, claim: Claim) -> None:
        with self._database.write() as connection:
            self._fenced(connection, claim, {})
            end(connection, claim.job_id, JobStatus.CANCELLED, self._clock())

    def pause(self, claim: Claim, why: dict[str, Any]) -> None:
        """Pauses a running job until it is resumed; `why` has a `reason` of `HoldReason` and a `message`."""
        with self._database.write() as connection:
            row = self._fenced(connection, claim, {})
            if _stop_request(row) is StopRequest.CANCEL:
                end(connection, claim.job_id, JobStatus.CANCELLED, self._clock())
            else:
                hold(connection, claim.job_id, why, self._clock())

    def release(self, claim: Claim, reason: str) -> None:
        """Puts a running job back into the queue."""
        with self._database.write() as connection:
            self._requeue(connection, self._fenced(connection, claim, {}), reason)

    def died(self, claim: Claim, cause: dict[str, Any]) -> JobStatus:
        """Records that the attempt ended without an outcome; returns the job's new status.

        The job is queued again, unless `max_deaths` attempts in a row died without a new checkpoint. `cause` has a
        `message`.
        """
        with self._database.write() as connection:
            return self._record_death(connection, self._fenced(connection, claim, {}), cause)

    def requeue_lost(self) -> list[str]:
        """Requeues jobs whose lease has expired; returns their ids."""
        with self._database.write() as connection:
            name, now = self._leases(connection)
            expired = sa.or_(jobs.c.lease_clock.is_distinct_from(name), jobs.c.lease_until < now)
            return self._record_deaths(connection, expired, "its worker did not renew the claim")

    def requeue_of(self, worker: str) -> list[str]:
        """Requeues the jobs of a worker that is known to have ended; returns their ids."""
        with self._database.write() as connection:
            return self._record_deaths(connection, jobs.c.worker == worker, "its worker was killed")

    def preempt(self, workers: Collection[str], *, slot_is_free: bool = False) -> str | None:
        """Requests the preemption of one job of `workers` if `scheduling.find_victim` finds one; returns its id."""
        with self._database.write() as connection:
            victim = find_victim(connection, workers, self._max_running, slot_is_free=slot_is_free)
            if victim is None:
                return None
            job = get_job(connection, victim, lock=True)
            if job.status is not JobStatus.RUNNING or job.stop_request is not None:
                return None
            message = "a job with a higher priority is queued: this one will be preempted"
            set_stop_request(connection, victim, StopRequest.PREEMPT, message, self._clock())
            return victim

    def resume_held(self, free_bytes: int) -> list[str]:
        """Requeues jobs that a full disk paused if `free_bytes` are enough for them; returns their ids."""
        query = sa.select(jobs.c.id, jobs.c.hold).where(jobs.c.status == JobStatus.PAUSED).with_for_update()
        with self._database.write() as connection:
            held = [row for row in connection.execute(query) if row.hold["reason"] == HoldReason.DISK_FULL]
            ready = [row.id for row in held if row.hold.get("needs_bytes", 0) <= free_bytes]
            for job_id in ready:
                enqueue(connection, job_id, "the disk has enough free space again", self._clock())
            return ready

    def stop_request(self, claim: Claim) -> StopRequest | None:
        """What the claimed job was asked to do. Raises: ClaimLost."""
        query = sa.select(jobs.c.stop_request).where(*_owned(claim))
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise _lost(claim)
        return _stop_request(row)

    def is_running(self, claim: Claim) -> bool:
        """Whether the claim still owns its job."""
        query = sa.select(jobs.c.id).where(*_owned(claim))
        with self._database.read() as connection:
            return connection.execute(query).one_or_none() is not None

    def _renewed(self, connection: Connection) -> dict[str, Any]:
        name, now = self._leases(connection)
        return {"lease_clock": name, "lease_until": now + self._lease_s}

    def _fenced(self, connection: Connection, claim: Claim, values: dict[str, Any]) -> Row[Any]:
        """The claimed row after the update, locked until the transaction ends. Raises: ClaimLost."""
        statement = sa.update(jobs).where(*_owned(claim)).values({"attempt": claim.token, **values}).returning(jobs)
        row = connection.execute(statement).one_or_none()
        if row is None:
            raise _lost(claim)
        return row

    def _record_deaths(self, connection: Connection, condition: sa.ColumnElement[bool], message: str) -> list[str]:
        query = sa.select(jobs).where(jobs.c.status == JobStatus.RUNNING, condition).with_for_update(skip_locked=True)
        rows = connection.execute(query).all()
        for row in rows:
            self._record_death(connection, row, {"message": message})
        return [row.id for row in rows]

    def _record_death(self, connection: Connection, row: Row[Any], cause: dict[str, Any]) -> JobStatus:
        deaths = [*row.deaths, {"attempt": row.attempt, "step": row.step, "phase": row.phase, **cause}]
        if len(deaths) < self._max_deaths or row.stop_request in (StopRequest.CANCEL, StopRequest.PAUSE):
            return self._requeue(connection, row, cause["message"], deaths=deaths)
        end(connection, row.id, JobStatus.FAILED, self._clock(), error=_kept_dying(deaths), deaths=deaths)
        return JobStatus.FAILED

    def _requeue(self, connection: Connection, row: Row[Any], reason: str, **values: Any) -> JobStatus:
        """Requeues the job, unless a cancel or a pause was requested; returns its new status."""
        if row.stop_request == StopRequest.CANCEL:
            end(connection, row.id, JobStatus.CANCELLED, self._clock(), **values)
            return JobStatus.CANCELLED
        if row.stop_request == StopRequest.PAUSE:
            hold(connection, row.id, USER_HOLD, self._clock(), **values)
            return JobStatus.PAUSED
        enqueue(connection, row.id, reason, self._clock(), **values)
        return JobStatus.QUEUED


def _owned(claim: Claim) -> tuple[sa.ColumnElement[bool], ...]:
    return jobs.c.id == claim.job_id, jobs.c.attempt == claim.token, jobs.c.status == JobStatus.RUNNING


def _lost(claim: Claim) -> ClaimLost:
    return ClaimLost(f"attempt {claim.token} of job {claim.job_id} no longer owns it: nothing was written")


def _stop_request(row: Row[Any]) -> StopRequest | None:
    return None if row.stop_request is None else StopRequest(row.stop_request)


def _unreadable(job_id: str, error: ValidationError) -> dict[str, Any]:
    return JobFailed(
        f"the stored configuration of job {job_id} cannot be read by this version: post it again "
        f"({error.error_count()} faults)",
        reason=FailureReason.INVALID_INPUT,
    ).as_dict()


def _kept_dying(deaths: list[dict[str, Any]]) -> dict[str, Any]:
    """The error of a job whose attempts kept dying; its reason is theirs, if they have one in common."""
    causes = "; ".join(f"attempt {death['attempt']}: {death['message']}" for death in deaths)
    reasons = {death.get("reason", FailureReason.TRAINER_DIED) for death in deaths}
    reason = reasons.pop() if len(reasons) == 1 else FailureReason.TRAINER_DIED
    message = f"{len(deaths)} attempts in a row died without a new checkpoint. {causes}"
    return JobFailed(message, reason=reason, deaths=deaths).as_dict()
