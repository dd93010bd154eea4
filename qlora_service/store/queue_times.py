"""Expected end of queued jobs, from the ETAs of running jobs and the forecasts of queued ones."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from qlora_service.domain.jobs import JobStatus
from qlora_service.store.tables import jobs


def seconds_to_end(connection: Connection, job_ids: Collection[str]) -> dict[str, float]:
    """Seconds until each of these queued jobs ends; a job behind one without a forecast is left out.

    Assumes as many slots as jobs are running, at least one: only the workers know the number of slots.
    """
    if not job_ids:
        return {}
    columns = (jobs.c.id, jobs.c.eta_s, jobs.c.forecast["time"]["seconds"].as_float().label("seconds"))
    running = connection.execute(sa.select(*columns).where(jobs.c.status == JobStatus.RUNNING)).all()
    queue = sa.select(*columns).where(jobs.c.status == JobStatus.QUEUED).order_by(jobs.c.priority.desc(), jobs.c.id)
    slots = [_known(row.eta_s, row.seconds) for row in running] or [0.0]
    heapq.heapify(slots)
    ends: dict[str, float] = {}
    for row in connection.execute(queue):
        end = heapq.heappop(slots) + _known(row.seconds)
        heapq.heappush(slots, end)
        if row.id in job_ids and end < math.inf:
            ends[row.id] = end
    return ends


def _known(*seconds: float | None) -> float:
    return next((value for value in seconds if value is not None), math.inf)
