"""Idempotency keys: a request's answer, stored with its key in the transaction that did the work.

Concurrent requests with one key wait for each other: on SQLite because there is one writer at a time, on PostgreSQL
because an insert waits for an uncommitted row with the same key. One does the work; the others find its answer. A
refused request rolls back, and its key with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from qlora_service.errors import Conflict
from qlora_service.store.database import Database
from qlora_service.store.tables import idempotency_keys as keys
from qlora_service.store.upsert import insert

KEY_LIFETIME = timedelta(days=7)
RETRY_WINDOW = timedelta(minutes=10)
"""Longer than any client waits before an automatic retry"""
MAX_DELETED_PER_REQUEST = 100
"""Expired keys that one request deletes at most, so that none waits for a long history"""

Result = TypeVar("Result")
Answer = dict[str, Any]
"""An HTTP answer as JSON"""


@dataclass(frozen=True)
class RequestAttempt:
    """When a request arrived, and whether its client marked it as a retry."""

    arrived_at: datetime
    is_retry: bool


@dataclass(frozen=True)
class Once(Generic[Result]):
    """A request under an idempotency key; `answer` renders the action's result."""

    key: str
    project: str
    fingerprint: str
    """Hash of the whole request: the same key with another fingerprint is an error"""
    answer: Callable[[Result], Answer]
    attempt: RequestAttempt | None = None
    """Set where the key is derived from the request, so that an identical request may be intended twice.

    A first attempt is then a new request, unless its own retry has overtaken it; a retry gets the answer of the last
    identical request within RETRY_WINDOW.
    """


class Replay(Exception):
    """The request was answered before; raised instead of doing the work again."""

    def __init__(self, answer: Answer) -> None:
        super().__init__("the request was answered before")
        self.answer = answer


def recall(database: Database, once: Once[Any] | None) -> None:
    """Returns when the key is new: call it before work that `write_once` would throw away.

    Raises:
        Replay: the request was answered before.
        Conflict: the key was used for another request.
    """
    if once is not None:
        with database.read() as connection:
            raise_stored_answer(connection, once)


def write_once(
    database: Database, once: Once[Result] | None, now: datetime, action: Callable[[Connection], Result]
) -> Result:
    """The result of `action`; its writes and the key's answer are one transaction.

    Raises:
        Replay, Conflict: as `recall` does.
    """
    with database.write() as connection:
        if once is None:
            return action(connection)
        reserve(connection, once, now)
        result = action(connection)
        keep(connection, once, result)
        return result


def raise_stored_answer(connection: Connection, once: Once[Any]) -> None:
    """As `recall`, in the caller's transaction."""
    query = sa.select(keys.c.fingerprint, keys.c.answer).where(*_same(once))
    if once.attempt is not None:
        query = query.where(_answers(once.attempt))
    row = connection.execute(query).one_or_none()
    if row is None:
        return
    if once.attempt is None and row.fingerprint != once.fingerprint:
        raise Conflict(
            f"the Idempotency-Key {once.key!r} was used for another request, whose body, path or method differs: "
            "send a new key with every new request, and an old one only to send the same request again",
            location="idempotency-key",
        )
    raise Replay(row.answer)


def reserve(connection: Connection, once: Once[Any], now: datetime) -> None:
    """Reserve the key for the caller's transaction, which must `keep` its answer; waits for a concurrent holder.

    Raises:
        Replay, Conflict: as `recall` does.
    """
    _delete_old(connection, now)
    mark = once.fingerprint if once.attempt is None else _mark(once.attempt)
    row = {"project": once.project, "key": once.key, "fingerprint": mark, "answer": {}, "created_at": now}
    new = insert(connection, keys).values(row)
    if once.attempt is None:
        new = new.on_conflict_do_nothing()
    else:
        new = new.on_conflict_do_update(
            index_elements=["project", "key"], set_=row, where=sa.not_(_answers(once.attempt))
        )
    inserted = connection.execute(new.returning(keys.c.key)).one_or_none()
    if inserted is None:
        # A separate statement sees what was committed while the insert waited (PostgreSQL, read committed).
        raise_stored_answer(connection, once)


def keep(connection: Connection, once: Once[Result], result: Result) -> None:
    """Store the answer under the reserved key."""
    connection.execute(sa.update(keys).where(*_same(once)).values(answer=once.answer(result)))


def _mark(attempt: RequestAttempt) -> str:
    """The value stored instead of a fingerprint if the key is derived from the request: which attempt wrote the row."""
    return "retry" if attempt.is_retry else "first"


def _answers(attempt: RequestAttempt) -> sa.ColumnElement[bool]:
    """Condition: the row with the attempt's key has the attempt's answer."""
    if attempt.is_retry:
        return keys.c.created_at >= attempt.arrived_at - RETRY_WINDOW
    # Written by this attempt's own retry, while the attempt was still at work.
    return sa.and_(keys.c.fingerprint == "retry", keys.c.created_at >= attempt.arrived_at)


def _same(once: Once[Any]) -> tuple[sa.ColumnElement[bool], ...]:
    return keys.c.project == once.project, keys.c.key == once.key


def _delete_old(connection: Connection, now: datetime) -> None:
    old = (
        sa.select(keys.c.project, keys.c.key)
        .where(keys.c.created_at < now - KEY_LIFETIME)
        .order_by(keys.c.created_at)
        .limit(MAX_DELETED_PER_REQUEST)
        .with_for_update(skip_locked=True)
    )
    connection.execute(sa.delete(keys).where(sa.tuple_(keys.c.project, keys.c.key).in_(old)))
