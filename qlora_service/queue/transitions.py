"""Changes of a job's status, each with its event, in the caller's transaction. Callers decide when to change it.

Every status is written here, except the initial one (`store.jobs.insert_job`) and a claim's (`queue.Queue.claim`).
Each follows `domain.jobs.TRANSITIONS`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from qlora_service.domain.jobs import HoldReason, JobStatus, sources_of
from qlora_service.store.jobs import append_event
from qlora_service.store.tables import jobs
from qlora_service.store.webhooks import insert_end_deliveries

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


def enqueue(connection: Connection, job_id: str, reason: str, now: datetime, **values: Any) -> None:
    """Put a running or paused job back into the queue; `values` are further columns."""
    step = jobs.c.checkpoint_step
    _change_status(connection, job_id, JobStatus.QUEUED, now, {"reason": reason}, step=step, **values)


def hold(connection: Connection, job_id: str, why: dict[str, Any], now: datetime, **values: Any) -> None:
    """Pause a queued or running job; `why` has a `reason` of `HoldReason` and a `message`."""
    step = jobs.c.checkpoint_step
    _change_status(connection, job_id, JobStatus.PAUSED, now, {"hold": why}, step=step, hold=why, **values)


def end(connection: Connection, job_id: str, status: JobStatus, now: datetime, **values: Any) -> None:
    """Give a job its terminal status, and queue the deliveries to its project's webhooks."""
    event = {"error": values["error"]} if "error" in values else {}
    insert_end_deliveries(connection, job_id, status, now)
    _change_status(connection, job_id, status, now, event, finished_at=now, **values)


def _change_status(
    connection: Connection, job_id: str, status: JobStatus, now: datetime, event: dict[str, Any], **values: Any
) -> None:
    """Write the new status of a job that no worker runs any more, and its event."""
    values = {**_NOT_RUNNING, "status": status, **values}
    legal = jobs.c.status.in_(sources_of(status))
    changed = sa.update(jobs).where(jobs.c.id == job_id, legal).values(values).returning(jobs.c.id)
    assert connection.execute(changed).one_or_none() is not None, f"job {job_id} cannot become {status}"
    append_event(connection, job_id, now, "status", {"status": status, **event})
