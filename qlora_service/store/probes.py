"""Rows of probes: steps to be timed for a plan when a slot is free. Functions take the caller's transaction.

A probe belongs to the worker that took it. A worker's name is its slot's, so after a crash the next worker of the slot
takes the same probe again.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from qlora_service.store.tables import probes
from qlora_service.store.upsert import insert

PENDING_LIFETIME = timedelta(days=1)
"""Lifetime of a probe that no worker took, and of a failure, which may be temporary"""
RESULT_LIFETIME = timedelta(days=30)
"""Lifetime of a result: versions and drivers change"""


@dataclass(frozen=True)
class Probe:
    """A step to be timed, and its result."""

    key: str
    request: dict[str, Any]
    created_at: datetime
    result: dict[str, Any] | None
    """Figures, or `error`; None before the probe has run"""


def insert_probe(connection: Connection, key: str, request: dict[str, Any], now: datetime) -> None:
    """Insert the probe unless it exists."""
    row = insert(connection, probes).values(key=key, request=request, created_at=now)
    connection.execute(row.on_conflict_do_nothing(index_elements=["key"]))


def find_probe(connection: Connection, key: str) -> Probe | None:
    row = connection.execute(_select().where(probes.c.key == key)).one_or_none()
    return None if row is None else Probe(*row)


def take_probe(connection: Connection, worker: str, device: str) -> Probe | None:
    """The oldest free probe for this kind of device, now assigned to the worker; its own earlier ones come first."""
    free = (probes.c.result.is_(sa.null()), sa.or_(probes.c.worker.is_(None), probes.c.worker == worker))
    on_device = probes.c.request["device"].as_string() == device
    query = _select().where(*free, on_device).order_by(probes.c.worker.is_(None), probes.c.created_at, probes.c.key)
    row = connection.execute(query.limit(1).with_for_update(skip_locked=True)).one_or_none()
    if row is None:
        return None
    connection.execute(sa.update(probes).where(probes.c.key == row.key).values(worker=worker))
    return Probe(*row)


def has_probe(connection: Connection, worker: str, device: str) -> bool:
    """Whether `take_probe` would return a probe."""
    free = (probes.c.result.is_(sa.null()), sa.or_(probes.c.worker.is_(None), probes.c.worker == worker))
    query = sa.select(probes.c.key).where(*free, probes.c.request["device"].as_string() == device)
    return connection.execute(query.limit(1)).one_or_none() is not None


def release_probe(connection: Connection, worker: str) -> None:
    """Release the worker's probe."""
    connection.execute(sa.update(probes).where(probes.c.worker == worker).values(worker=None))


def finish_probe(connection: Connection, key: str, result: dict[str, Any], now: datetime) -> bool:
    """Store the result; False if the probe has one already, or was deleted."""
    unknown = (probes.c.key == key, probes.c.result.is_(sa.null()))
    statement = sa.update(probes).where(*unknown).values(result=result, worker=None, created_at=now)
    return connection.execute(statement.returning(probes.c.key)).one_or_none() is not None


def delete_expired(connection: Connection, now: datetime) -> int:
    """Delete probes that no worker took in time, old failures and old results; their number."""
    untaken = sa.and_(probes.c.result.is_(sa.null()), probes.c.worker.is_(None))
    failed = probes.c.result["error"].as_string().is_not(None)
    since = probes.c.created_at
    expired = sa.or_(sa.and_(since < now - PENDING_LIFETIME, sa.or_(untaken, failed)), since < now - RESULT_LIFETIME)
    statement = sa.delete(probes).where(expired).returning(probes.c.key)
    return len(connection.execute(statement).all())


def _select() -> sa.Select[Any]:
    return sa.select(probes.c.key, probes.c.request, probes.c.created_at, probes.c.result)
