"""The queue: claim, report, finish, requeue. Every write of a running attempt carries its fencing token.

The token is the attempt's number: each claim adds one, so an older claim's writes find no row
(`WHERE id = ? AND attempt = ? AND status = 'running'`) and raise `ClaimLost`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.engine import Connection, Row

from qlora_service.domain.clock import Clock, utc_now
from qlora_service.domain.jobs import FailureReason, HoldReason, Job, JobStatus, StopRequest
from qlora_service.errors import ClaimLost, Conflict, JobFailed
from qlora_service.models.base.needed_base import NeededBase
from qlora_service.queue.scheduling import count_overtaken, find_overtaker
from qlora_service.store.database import Database
from qlora_service.store.jobs import append_event, claimable, get_job, job_from_row, may_run_more
from qlora_service.store.lease_clock import LeaseClock, lease_clock
from qlora_service.store.tables import jobs
from qlora_service.store.webhooks import tell_end

MAX_DEATHS = 3
"""Attempts that may end without an outcome before a job that gets no further is failed."""
CLAIM_LOCK = 0x716C6F7261  # "qlora", for pg_advisory_xact_lock


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
    plan: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None
    checkpoint_step: int | None = None
    """Steps that are durable; when they become more, the job got further, and earlier deaths no longer count."""


class Queue:
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
        """`max_running` is how many jobs of one project may run at a time."""
        self._database = database
        self._lease_s = lease_s
        self._clock = clock
        self._leases = leases
        self._max_running = max_running
        self._max_deaths = max_deaths

    # --- by workers

    def claim(self, worker: str, warm: NeededBase | None = None) -> tuple[Claim, Job] | None:
        """The most urgent queued job, now running under a new token; None when nothing is queued.

        Among equally urgent ones the oldest, or, where the worker has the base `warm` loaded, the oldest that runs on
        it; but no job is overtaken more than `MAX_OVERTAKEN` times.
        """
        now = self._clock()
        with self._database.write() as connection:
            head = self._head(connection).with_for_update(skip_locked=True).scalar_subquery()
            overtaker = None if warm is None else self._overtaker(connection, warm)
            statement = (
                sa.update(jobs)
                .where(jobs.c.id == (overtaker or head), jobs.c.status == JobStatus.QUEUED)
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
                self._end(connection, row.id, JobStatus.FAILED, error=_unreadable(row.id, error))
                return None
            data = {"status": JobStatus.RUNNING, "attempt": job.attempt, "worker": worker}
            append_event(connection, job.id, now, "status", data)
            return Claim(job.id, job.attempt), job

    def renew(self, claim: Claim) -> StopRequest | None:
        """Extend the lease; what the attempt is asked to do at its next step boundary.

        Raises:
            ClaimLost: a newer claim owns the job, or it is no longer running.
        """
        with self._database.write() as connection:
            return _stop_request(self._fenced(connection, claim, self._renewed(connection)))

    def report(
        self, claim: Claim, progress: Progress, event: tuple[str, dict[str, Any]] | None = None
    ) -> StopRequest | None:
        """Store progress and, with it, an event; renews the lease. Answers and raises as `renew` does."""
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

    def succeed(self, claim: Claim, result: dict[str, Any]) -> None:
        with self._database.write() as connection:
            self._fenced(connection, claim, {"result": result})
            self._end(connection, claim.job_id, JobStatus.SUCCEEDED, eta_s=0.0)

    def fail(self, claim: Claim, error: dict[str, Any]) -> None:
        with self._database.write() as connection:
            self._fenced(connection, claim, {})
            self._end(connection, claim.job_id, JobStatus.FAILED, error=error)

    def cancelled(self, claim: Claim) -> None:
        with self._database.write() as connection:
            self._fenced(connection, claim, {})
            self._end(connection, claim.job_id, JobStatus.CANCELLED)

    def pause(self, claim: Claim, hold: dict[str, Any]) -> None:
        """Take a running job off its worker until it is resumed; `hold` says why, with a `reason` of `HoldReason`."""
        with self._database.write() as connection:
            row = self._fenced(connection, claim, {})
            if _stop_request(row) is StopRequest.CANCEL:
                self._end(connection, claim.job_id, JobStatus.CANCELLED)
            else:
                self._hold(connection, claim.job_id, hold)

    def release(self, claim: Claim, why: str) -> None:
        """Give a running job back to the queue, to be claimed again."""
        with self._database.write() as connection:
            self._requeue(connection, self._fenced(connection, claim, {}), why)

    def died(self, claim: Claim, cause: dict[str, Any]) -> JobStatus:
        """Note that the attempt ended without an outcome, by `cause` (with a `message`); the job's status from now on.

        It goes back to the queue, unless too many attempts in a row died without getting further.
        """
        with self._database.write() as connection:
            return self._bury(connection, self._fenced(connection, claim, {}), cause)

    def requeue_lost(self) -> list[str]:
        """Return jobs whose lease has expired to the queue; their ids."""
        with self._database.write() as connection:
            name, now = self._leases(connection)
            expired = sa.or_(jobs.c.lease_clock.is_distinct_from(name), jobs.c.lease_until < now)
            return self._bury_all(connection, expired, "its worker did not renew the claim")

    def requeue_of(self, worker: str) -> list[str]:
        """Return the jobs of a worker that is known to be gone to the queue; their ids."""
        with self._database.write() as connection:
            return self._bury_all(connection, jobs.c.worker == worker, "its worker was killed")

    def preempt(self, workers: Collection[str], *, slot_is_free: bool = False) -> str | None:
        """Ask the least urgent job of `workers` to make room, if a more urgent one is queued; its id.

        One at a time: while one of theirs is stopping, for whatever reason, a slot will be free. A project that has as
        many jobs running as it may makes room by one of its own, also where a slot is free.
        """
        mine = (jobs.c.status == JobStatus.RUNNING, jobs.c.worker.in_(workers))
        with self._database.write() as connection:
            running = connection.execute(
                sa.select(jobs.c.id, jobs.c.priority, jobs.c.project, jobs.c.stop_request)
                .where(*mine)
                .order_by(jobs.c.priority, jobs.c.id.desc())
            ).all()
            if not running or any(row.stop_request for row in running):
                return None
            urgent = connection.execute(
                sa.select(jobs.c.project, sa.func.max(jobs.c.priority).label("priority"))
                .where(jobs.c.status == JobStatus.QUEUED, jobs.c.priority > running[0].priority)
                .group_by(jobs.c.project)
            ).all()
            victim = None
            for one in sorted(urgent, key=lambda row: -row.priority):
                own_only = not may_run_more(connection, one.project, self._max_running)
                if slot_is_free and not own_only:
                    continue  # it will be claimed
                less_urgent = (row for row in running if row.priority < one.priority)
                victim = next((row.id for row in less_urgent if not own_only or row.project == one.project), None)
                if victim is not None:
                    break
            if victim is None:
                return None
            job = get_job(connection, victim, lock=True)
            if job.status is not JobStatus.RUNNING or job.stop_request is not None:
                return None
            self._ask(connection, victim, StopRequest.PREEMPT, "a more urgent job waits: it will make room")
            return job.id

    def resume_held(self, free_bytes: int) -> list[str]:
        """Queue the jobs again that waited for room on the disk, as far as there is room now; their ids."""
        query = sa.select(jobs.c.id, jobs.c.hold).where(jobs.c.status == JobStatus.PAUSED).with_for_update()
        with self._database.write() as connection:
            held = [row for row in connection.execute(query) if row.hold["reason"] == HoldReason.DISK_FULL]
            ready = [row.id for row in held if row.hold.get("needs_bytes", 0) <= free_bytes]
            for job_id in ready:
                self._enqueue(connection, job_id, "there is room on the disk again")
            return ready

    # --- by users

    def request_cancel(self, connection: Connection, job_id: str) -> Job:
        """Cancel at once, or a running job at its next step boundary; the job as it is then.

        Raises:
            NotFound: no such job.
            Conflict: it has ended otherwise.
        """
        job = get_job(connection, job_id, lock=True)
        if job.status is JobStatus.RUNNING:
            if job.stop_request is not StopRequest.CANCEL:
                self._ask(connection, job_id, StopRequest.CANCEL, "cancel requested")
        elif not job.status.terminal:
            self._end(connection, job_id, JobStatus.CANCELLED)
        elif job.status is not JobStatus.CANCELLED:
            raise Conflict(f"job {job_id} has {job.status} already: there is nothing left to cancel")
        return get_job(connection, job_id)

    def request_pause(self, connection: Connection, job_id: str) -> Job:
        """Pause at once if queued, at the next step boundary if running; the job as it is then.

        Raises:
            NotFound: no such job.
            Conflict: it has ended, or is being cancelled.
        """
        job = _wanted(connection, job_id, "pause")
        if job.status is JobStatus.RUNNING:
            if job.stop_request is not StopRequest.PAUSE:
                self._ask(connection, job_id, StopRequest.PAUSE, "pause requested")
        elif job.status is JobStatus.QUEUED:
            self._hold(connection, job_id, USER_HOLD)
        elif job.hold != USER_HOLD:  # it waits for room on the disk, and would go on by itself
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(hold=USER_HOLD))
            append_event(connection, job_id, self._clock(), "log", {"message": USER_HOLD["message"]})
        return get_job(connection, job_id)

    def resume(self, connection: Connection, job_id: str) -> Job:
        """Put a paused job back into the queue, or take back a pause that was asked for; the job as it is then.

        Raises:
            NotFound: no such job.
            Conflict: it has ended, or is being cancelled.
        """
        job = _wanted(connection, job_id, "resume")
        if job.status is JobStatus.PAUSED:
            self._enqueue(connection, job_id, "resumed")
        elif job.stop_request is StopRequest.PAUSE:
            self._ask(connection, job_id, None, "pause taken back")
        return get_job(connection, job_id)

    # --- looking

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

    # --- inside

    def _head(self, connection: Connection) -> sa.Select[tuple[str]]:
        """The id of the queued job that is next: the most urgent, then the oldest, whose project may run one more."""
        if connection.dialect.name == "postgresql":
            # Two claims at once would count the same running jobs, and the same jobs as overtaken.
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(CLAIM_LOCK)))
        return claimable(self._max_running).order_by(jobs.c.priority.desc(), jobs.c.id).limit(1)

    def _overtaker(self, connection: Connection, warm: NeededBase) -> str | None:
        """The id of the job that is claimed for the loaded base, locked, with all that it overtakes counted."""
        job_id = find_overtaker(connection, self._max_running, warm)
        if job_id is None:
            return None
        query = sa.select(jobs.c.priority).where(jobs.c.id == job_id, jobs.c.status == JobStatus.QUEUED)
        row = connection.execute(query.with_for_update(skip_locked=True)).one_or_none()
        if row is None:  # its owner changes it just now
            return None
        count_overtaken(connection, self._max_running, job_id, row.priority)
        return job_id

    def _renewed(self, connection: Connection) -> dict[str, Any]:
        name, now = self._leases(connection)
        return {"lease_clock": name, "lease_until": now + self._lease_s}

    def _fenced(self, connection: Connection, claim: Claim, values: dict[str, Any]) -> Row[Any]:
        """The claimed row after updating it; other writers wait for this transaction. Raises: ClaimLost."""
        statement = sa.update(jobs).where(*_owned(claim)).values({"attempt": claim.token, **values}).returning(jobs)
        row = connection.execute(statement).one_or_none()
        if row is None:
            raise _lost(claim)
        return row

    def _bury_all(self, connection: Connection, condition: sa.ColumnElement[bool], why: str) -> list[str]:
        query = sa.select(jobs).where(jobs.c.status == JobStatus.RUNNING, condition).with_for_update(skip_locked=True)
        rows = connection.execute(query).all()
        for row in rows:
            self._bury(connection, row, {"message": why})
        return [row.id for row in rows]

    def _bury(self, connection: Connection, row: Row[Any], cause: dict[str, Any]) -> JobStatus:
        deaths = [*row.deaths, {"attempt": row.attempt, "step": row.step, "phase": row.phase, **cause}]
        if len(deaths) < self._max_deaths or row.stop_request in (StopRequest.CANCEL, StopRequest.PAUSE):
            return self._requeue(connection, row, cause["message"], deaths=deaths)
        self._end(connection, row.id, JobStatus.FAILED, error=_poisoned(deaths), deaths=deaths)
        return JobStatus.FAILED

    def _requeue(self, connection: Connection, row: Row[Any], why: str, **values: Any) -> JobStatus:
        """Into the queue, or where its user wants the job instead; which it was."""
        if row.stop_request == StopRequest.CANCEL:
            self._end(connection, row.id, JobStatus.CANCELLED, **values)
            return JobStatus.CANCELLED
        if row.stop_request == StopRequest.PAUSE:
            self._hold(connection, row.id, USER_HOLD, **values)
            return JobStatus.PAUSED
        self._enqueue(connection, row.id, why, **values)
        return JobStatus.QUEUED

    def _enqueue(self, connection: Connection, job_id: str, why: str, **values: Any) -> None:
        self._move(connection, job_id, JobStatus.QUEUED, {"reason": why}, step=jobs.c.checkpoint_step, **values)

    def _hold(self, connection: Connection, job_id: str, hold: dict[str, Any], **values: Any) -> None:
        step = jobs.c.checkpoint_step
        self._move(connection, job_id, JobStatus.PAUSED, {"hold": hold}, step=step, hold=hold, **values)

    def _end(self, connection: Connection, job_id: str, status: JobStatus, **values: Any) -> None:
        told = {"error": values["error"]} if "error" in values else {}
        now = self._clock()
        tell_end(connection, job_id, status, now)
        self._move(connection, job_id, status, told, finished_at=now, **values)

    def _move(
        self, connection: Connection, job_id: str, status: JobStatus, told: dict[str, Any], **values: Any
    ) -> None:
        """Give a job that nobody runs any more its new status, and tell it as an event with `told`."""
        values = {**_NOT_RUNNING, "status": status, **values}
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(values))
        append_event(connection, job_id, self._clock(), "status", {"status": status, **told})

    def _ask(self, connection: Connection, job_id: str, what: StopRequest | None, message: str) -> None:
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(stop_request=what))
        append_event(connection, job_id, self._clock(), "log", {"message": message})


USER_HOLD = {"reason": HoldReason.USER, "message": "paused until it is resumed"}

_NOT_RUNNING: dict[str, Any] = {
    "worker": None,
    "lease_until": None,
    "lease_clock": None,
    "stop_request": None,
    "hold": None,
    "phase": None,
    "eta_s": None,
}


def _wanted(connection: Connection, job_id: str, what: str) -> Job:
    """The job, locked. Raises: NotFound; Conflict, when it has ended or is being cancelled."""
    job = get_job(connection, job_id, lock=True)
    if job.status.terminal or job.stop_request is StopRequest.CANCEL:
        state = "is being cancelled" if job.stop_request else f"is {job.status} already"
        raise Conflict(f"job {job_id} {state}: there is nothing left to {what}")
    return job


def _owned(claim: Claim) -> tuple[sa.ColumnElement[bool], ...]:
    return jobs.c.id == claim.job_id, jobs.c.attempt == claim.token, jobs.c.status == JobStatus.RUNNING


def _lost(claim: Claim) -> ClaimLost:
    return ClaimLost(f"attempt {claim.token} of job {claim.job_id} no longer owns it: nothing was written")


def _stop_request(row: Row[Any]) -> StopRequest | None:
    return None if row.stop_request is None else StopRequest(row.stop_request)


def _unreadable(job_id: str, error: ValidationError) -> dict[str, Any]:
    return JobFailed(
        f"the stored configuration of job {job_id} is not one that this version understands: post it again "
        f"({error.error_count()} faults)",
        reason=FailureReason.INVALID_INPUT,
    ).as_dict()


def _poisoned(deaths: list[dict[str, Any]]) -> dict[str, Any]:
    """The failure of a job whose attempts kept dying, by their common reason if they have one."""
    causes = "; ".join(f"attempt {death['attempt']}: {death['message']}" for death in deaths)
    reasons = {death.get("reason", FailureReason.TRAINER_DIED) for death in deaths}
    reason = reasons.pop() if len(reasons) == 1 else FailureReason.TRAINER_DIED
    message = f"{len(deaths)} attempts in a row died without getting further. {causes}"
    return JobFailed(message, reason=reason, deaths=deaths).as_dict()
