"""Which queued job a worker takes that has a base loaded: one that runs on it, until others have waited enough."""

from __future__ import annotations

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.engine import Connection

from qlora_service.models.base.needed_base import NeededBase, may_change_base
from qlora_service.specs import JobSpec
from qlora_service.store.jobs import claimable
from qlora_service.store.tables import jobs

MAX_OVERTAKEN = 3
"""Younger jobs that may be claimed before a job because their base was loaded."""
LOOK_AHEAD = 64
"""Jobs at the front of the queue among which one for the loaded base is looked for: a bound on a claim's work."""


def find_overtaker(connection: Connection, max_running: int | None, warm: NeededBase) -> str | None:
    """The id of the first job that runs on the loaded base and may be claimed now; None when it is the front's turn.

    It is as urgent as the front, and everything that it overtakes may be overtaken once more.
    """
    spec = sa.case((jobs.c.base_weights_sha256 == warm.weights_sha256, jobs.c.spec))
    columns = jobs.c.id, jobs.c.priority, jobs.c.overtaken, sa.type_coerce(spec, sa.JSON).label("spec")
    queue = claimable(max_running).with_only_columns(*columns).order_by(jobs.c.priority.desc(), jobs.c.id)
    urgency: int | None = None
    for row in connection.execute(queue.limit(LOOK_AHEAD)):
        urgency = row.priority if urgency is None else urgency
        if row.priority < urgency:
            return None
        if row.spec is not None and runs_on(row.spec, warm):
            return str(row.id)
        if row.overtaken >= MAX_OVERTAKEN:
            return None
    return None


def runs_on(spec: object, warm: NeededBase) -> bool:
    """Whether a job with this stored spec, on the same weights, runs on the loaded base."""
    try:
        wanted = JobSpec.model_validate(spec, extra="ignore")
    except ValidationError:
        return False  # whose turn it is will find out
    return NeededBase.of(wanted, warm.weights_sha256) == warm and not may_change_base(wanted.adapter)


def count_overtaken(connection: Connection, max_running: int | None, job_id: str, priority: int) -> None:
    """Note of every job that could have been claimed before the one that was, that it was overtaken once more."""
    older = claimable(max_running).where(jobs.c.priority == priority, jobs.c.id < job_id)
    connection.execute(sa.update(jobs).where(jobs.c.id.in_(older)).values(overtaken=jobs.c.overtaken + 1))
