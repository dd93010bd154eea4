"""Requests that take effect once: an idempotency key and the answer it was given, in the transaction that did the work.

A key that another transaction is just using waits for it: on SQLite because writers take turns, on PostgreSQL because
an insert waits for an uncommitted row of the same key. So of any number of requests at once, one does the work; the
others find its answer. What is refused rolls back, and its key with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from qlora_service.errors import Conflict
from qlora_service.store.conflicts import insert
from qlora_service.store.tables import idempotency_keys as keys

KEPT_FOR = timedelta(days=7)
DELETED_AT_ONCE = 100
"""Most old keys that a new one removes: a request never waits for a long history."""

Result = TypeVar("Result")
Answer = dict[str, Any]
"""What the wire says, as JSON."""


@dataclass(frozen=True)
class Once(Generic[Result]):
    """A request under an idempotency key; `answer` renders what it is told of the action's result."""

    key: str
    project: str
    fingerprint: str
    """Of everything the request asks for: the same key with another fingerprint is a mistake."""
    answer: Callable[[Result], Answer]


class Replay(Exception):
    """Raised in place of doing the work again: the request was answered before."""

    def __init__(self, answer: Answer) -> None:
        super().__init__("the request was answered before")
        self.answer = answer


def recall(connection: Connection, once: Once[Any]) -> None:
    """Returns when the key is new.

    Raises:
        Replay: the request was answered before.
        Conflict: the key was used for another request.
    """
    row = connection.execute(sa.select(keys.c.fingerprint, keys.c.answer).where(*_same(once))).one_or_none()
    if row is None:
        return
    if row.fingerprint != once.fingerprint:
        raise Conflict(
            f"the Idempotency-Key {once.key!r} was used for another request, whose body, path or method differs: "
            "send a new key with every new request, and an old one only to send the same request again",
            location="idempotency-key",
        )
    raise Replay(row.answer)


def reserve(connection: Connection, once: Once[Any], now: datetime) -> None:
    """Takes the key for the caller's transaction, which has to `keep` its answer; waits for one that holds it.

    Raises:
        Replay, Conflict: as `recall` does.
    """
    _delete_old(connection, now)
    row = {"project": once.project, "key": once.key, "fingerprint": once.fingerprint, "answer": {}, "created_at": now}
    new = insert(connection, keys).values(row).on_conflict_do_nothing().returning(keys.c.key)
    inserted = connection.execute(new).one_or_none()
    if inserted is None:
        # A statement of its own sees what was committed while the insert waited (PostgreSQL, read committed).
        recall(connection, once)


def keep(connection: Connection, once: Once[Result], result: Result) -> None:
    """Stores the answer under the reserved key."""
    connection.execute(sa.update(keys).where(*_same(once)).values(answer=once.answer(result)))


def _same(once: Once[Any]) -> tuple[sa.ColumnElement[bool], ...]:
    return keys.c.project == once.project, keys.c.key == once.key


def _delete_old(connection: Connection, now: datetime) -> None:
    old = (
        sa.select(keys.c.project, keys.c.key)
        .where(keys.c.created_at < now - KEPT_FOR)
        .order_by(keys.c.created_at)
        .limit(DELETED_AT_ONCE)
        .with_for_update(skip_locked=True)
    )
    connection.execute(sa.delete(keys).where(sa.tuple_(keys.c.project, keys.c.key).in_(old)))
