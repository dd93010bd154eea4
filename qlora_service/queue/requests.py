"""Requests of users about their jobs: cancel, pause, resume. Functions take the caller's transaction."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from qlora_service.domain.jobs import Job, JobStatus, StopRequest
from qlora_service.errors import Conflict
from qlora_service.queue.transitions import USER_HOLD, end, enqueue, hold
from qlora_service.store.jobs import append_event, get_job
from qlora_service.store.tables import jobs


def request_cancel(connection: Connection, job_id: str, now: datetime) -> Job:
    """The job: cancelled, or if running asked to stop at its next step boundary.

    Raises:
        NotFound: no such job.
        Conflict: it has succeeded or failed.
    """
    job = get_job(connection, job_id, lock=True)
    if job.status is JobStatus.RUNNING:
        if job.stop_request is not StopRequest.CANCEL:
            set_stop_request(connection, job_id, StopRequest.CANCEL, "cancel requested", now)
    elif not job.status.terminal:
        end(connection, job_id, JobStatus.CANCELLED, now)
    elif job.status is not JobStatus.CANCELLED:
        raise Conflict(f"job {job_id} has {job.status} already: there is nothing left to cancel")
    return get_job(connection, job_id)


def request_pause(connection: Connection, job_id: str, now: datetime) -> Job:
    """The job: paused if it was queued, or if running asked to stop at its next step boundary.

    Raises:
        NotFound: no such job.
        Conflict: it has ended, or is being cancelled.
    """
    job = _unfinished(connection, job_id, "pause")
    if job.status is JobStatus.RUNNING:
        if job.stop_request is not StopRequest.PAUSE:
            set_stop_request(connection, job_id, StopRequest.PAUSE, "pause requested", now)
    elif job.status is JobStatus.QUEUED:
        hold(connection, job_id, USER_HOLD, now)
    elif job.hold != USER_HOLD:  # paused by a full disk, and would resume by itself
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(hold=USER_HOLD))
        append_event(connection, job_id, now, "log", {"message": USER_HOLD["message"]})
    return get_job(connection, job_id)


def request_resume(connection: Connection, job_id: str, now: datetime) -> Job:
    """The job: back in the queue if it was paused, or running on if its pause had not taken effect.

    Raises:
        NotFound: no such job.
        Conflict: it has ended, or is being cancelled.
    """
    job = _unfinished(connection, job_id, "resume")
    if job.status is JobStatus.PAUSED:
        enqueue(connection, job_id, "resumed", now)
    elif job.stop_request is StopRequest.PAUSE:
        set_stop_request(connection, job_id, None, "pause withdrawn", now)
    return get_job(connection, job_id)


def set_stop_request(
    connection: Connection, job_id: str, request: StopRequest | None, message: str, now: datetime
) -> None:
    """Ask a running attempt to stop at its next step boundary, or with None to go on; `message` is its event."""
    connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(stop_request=request))
    append_event(connection, job_id, now, "log", {"message": message})


def _unfinished(connection: Connection, job_id: str, action: str) -> Job:
    """The job, locked. Raises: NotFound; Conflict, when it has ended or is being cancelled."""
    job = get_job(connection, job_id, lock=True)
    if job.status.terminal or job.stop_request is StopRequest.CANCEL:
        state = "is being cancelled" if job.stop_request else f"is {job.status} already"
        raise Conflict(f"job {job_id} {state}: there is nothing left to {action}")
    return job
