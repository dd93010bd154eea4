"""Measurements of finished jobs of all projects, without their owners."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from qlora_service.domain.jobs import JobStatus
from qlora_service.store.tables import jobs

NEWEST_OF_BASE = 50
"""Older measurements may be of other versions, and add little"""
NEWEST = 1000


def measured_on(connection: Connection, base_weights_sha256: str, limit: int = NEWEST_OF_BASE) -> list[dict[str, Any]]:
    """Measurements of the newest succeeded jobs on a base, newest first."""
    query = _measured().where(jobs.c.base_weights_sha256 == base_weights_sha256)
    return list(connection.scalars(query.limit(limit)))


def measured_anywhere(connection: Connection, limit: int = NEWEST) -> list[dict[str, Any]]:
    """Measurements of the newest succeeded jobs, newest first."""
    return list(connection.scalars(_measured().limit(limit)))


def _measured() -> sa.Select[tuple[dict[str, Any]]]:
    measured = (jobs.c.status == JobStatus.SUCCEEDED, jobs.c.measured.is_not(sa.null()))
    return sa.select(jobs.c.measured).where(*measured).order_by(jobs.c.finished_at.desc(), jobs.c.id.desc())
