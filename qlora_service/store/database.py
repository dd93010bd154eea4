"""The database: SQLite in WAL mode by default. One transaction per request or claim, committed at the edge."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.engine import Connection, Engine, make_url

BUSY_TIMEOUT_MS = 10_000
Result = TypeVar("Result")


class Database:
    """Transactions on the service's state; safe to share between threads."""

    def __init__(self, url: str) -> None:
        self.url = url
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite" and parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        self._engine: Engine = sa.create_engine(url)
        if self._engine.dialect.name == "sqlite":
            sa.event.listen(self._engine, "connect", _configure_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write; on SQLite it holds the write lock from the start."""
        with self._engine.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent snapshot; never waits for a writer."""
        with self._engine.connect().execution_options(qlora_read=True) as connection:
            yield connection

    def migrate(self) -> None:
        """Bring the schema up to date; two processes may do so at once."""
        config = Config()
        config.set_main_option("script_location", "qlora_service.store:migrations")
        config.set_main_option("path_separator", "os")
        with self.write() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def close(self) -> None:
        self._engine.dispose()


def persist(action: Callable[[], Result], patience_s: float, pause_s: float = 0.5) -> Result:
    """What `action` returns, tried again while the database is locked or away, for up to `patience_s` seconds.

    Raises:
        OperationalError: the last one, when patience has run out.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return action()
        except sa.exc.OperationalError:
            if time.monotonic() + pause_s > deadline:
                raise
            time.sleep(pause_s)


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # autocommit mode: the driver must not open transactions by itself, _begin_sqlite does.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    _use_wal(cursor)
    # FULL: what was acknowledged survives a power cut (https://sqlite.org/pragma.html#pragma_synchronous).
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _use_wal(cursor: sqlite3.Cursor) -> None:
    # The first connection of all changes the file; another that comes just then is turned away at once, whatever
    # busy_timeout says.
    deadline = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    # A deferred transaction that reads and then writes fails at once when another wrote in between,
    # without waiting for busy_timeout; so writers take the lock first.
    read_only = connection.get_execution_options().get("qlora_read", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
