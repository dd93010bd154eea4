"""Probes as rows: steps that a plan wants timed when a slot is free. Functions take the caller's transaction.

A probe is its worker's for as long as that lives: the worker's name is its slot's, so the next one that has the slot
finds what its forerunner left, and takes it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from qlora_service.store.tables import probes
from qlora_service.store.upsert import insert

UNTAKEN = timedelta(days=1)
"""For so long somebody may still want to know; and what failed may go well after it"""
VALID = timedelta(days=30)
"""After that versions and drivers are likely to be others"""


@dataclass(frozen=True)
class Probe:
    """A step to be timed, and what came of it."""

    key: str
    request: dict[str, Any]
    created_at: datetime
    result: dict[str, Any] | None
    """Figures, or `error`"""


def ask_for(connection: Connection, key: str, request: dict[str, Any], now: datetime) -> None:
    """Note that somebody wants the probe; nothing changes where it is known already."""
    row = insert(connection, probes).values(key=key, request=request, created_at=now)
    connection.execute(row.on_conflict_do_nothing(index_elements=["key"]))


def find_probe(connection: Connection, key: str) -> Probe | None:
    row = connection.execute(_select().where(probes.c.key == key)).one_or_none()
    return None if row is None else Probe(*row)


def take_probe(connection: Connection, worker: str, device: str) -> Probe | None:
    """The oldest probe for a device of this kind that nobody has, now the worker's; what it had itself comes first."""
    free = (probes.c.result.is_(sa.null()), sa.or_(probes.c.worker.is_(None), probes.c.worker == worker))
    on_device = probes.c.request["device"].as_string() == device
    query = _select().where(*free, on_device).order_by(probes.c.worker.is_(None), probes.c.created_at, probes.c.key)
    row = connection.execute(query.limit(1).with_for_update(skip_locked=True)).one_or_none()
    if row is None:
        return None
    connection.execute(sa.update(probes).where(probes.c.key == row.key).values(worker=worker))
    return Probe(*row)


def is_wanted(connection: Connection, worker: str, device: str) -> bool:
    """Whether `take_probe` would find one."""
    free = (probes.c.result.is_(sa.null()), sa.or_(probes.c.worker.is_(None), probes.c.worker == worker))
    query = sa.select(probes.c.key).where(*free, probes.c.request["device"].as_string() == device)
    return connection.execute(query.limit(1)).one_or_none() is not None


def give_back(connection: Connection, worker: str) -> None:
    """Note that the worker has no probe any more: whoever is free may take it."""
    connection.execute(sa.update(probes).where(probes.c.worker == worker).values(worker=None))


def finish_probe(connection: Connection, key: str, result: dict[str, Any], now: datetime) -> bool:
    """Whether the result is stored; not where there is one, or nobody wants it any more."""
    unknown = (probes.c.key == key, probes.c.result.is_(sa.null()))
    statement = sa.update(probes).where(*unknown).values(result=result, worker=None, created_at=now)
    return connection.execute(statement.returning(probes.c.key)).one_or_none() is not None


def drop_old(connection: Connection, now: datetime) -> int:
    """How many probes were forgotten: those that nobody took in time, failures, and results too old to be believed."""
    untaken = sa.and_(probes.c.result.is_(sa.null()), probes.c.worker.is_(None))
    failed = probes.c.result["error"].as_string().is_not(None)
    since = probes.c.created_at
    gone = sa.or_(sa.and_(since < now - UNTAKEN, sa.or_(untaken, failed)), since < now - VALID)
    statement = sa.delete(probes).where(gone).returning(probes.c.key)
    return len(connection.execute(statement).all())


def _select() -> sa.Select[Any]:
    return sa.select(probes.c.key, probes.c.request, probes.c.created_at, probes.c.result)
