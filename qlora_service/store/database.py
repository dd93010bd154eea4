"""The database: SQLite in WAL mode, or PostgreSQL. One transaction per request or claim, committed at the edge."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url

from qlora_service.store.migrations import HEAD

BUSY_TIMEOUT_MS = 10_000
"""Longest wait for a write lock"""
STATEMENT_TIMEOUT_MS = 30_000
"""PostgreSQL: longest statement, which may wait for several locks"""
IDLE_TIMEOUT_MS = 20_000
"""PostgreSQL: longest idle transaction, so that a stopped process loses its locks"""
MIGRATION_TIMEOUT_MS = 600_000
MIGRATION_LOCK = 0x716C6F72616D  # "qloram", for pg_advisory_xact_lock
Result = TypeVar("Result")


class Database:
    """Transactions on the service's state; safe to share between threads."""

    def __init__(self, url: str) -> None:
        """`url` as SQLAlchemy writes it: `sqlite:///path` or `postgresql://user@host/name`."""
        self.url = url
        parsed = make_url(url)
        backend = parsed.get_backend_name()
        if backend == "sqlite":
            self._engine = _sqlite_engine(parsed)
        elif backend in ("postgresql", "postgres"):
            self._engine = _postgresql_engine(parsed)
        else:
            raise ValueError(f"the database URL names {backend!r}: use sqlite:///path or postgresql://user@host/name")
        # REPEATABLE READ: with PostgreSQL's default each statement has a snapshot of its own.
        snapshot = {} if backend == "sqlite" else {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        self._read_options = {"qlora_read": True, **snapshot}

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write; on SQLite it holds the write lock from the start."""
        with self._engine.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent snapshot; never waits for a writer."""
        with self._engine.connect().execution_options(**self._read_options) as connection:
            yield connection

    def migrate(self) -> None:
        """Migrate the schema to the newest revision; safe in several processes at once."""
        if self._revision() == HEAD:
            return
        # Imported here: it is needed once per release and would add 0.1 s to the start of every process.
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", "qlora_service.store:migrations")
        config.set_main_option("path_separator", "os")
        with self.write() as connection:
            if connection.dialect.name == "postgresql":
                _wait_for_other_migrations(connection)
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def _revision(self) -> str | None:
        """The schema's revision; None for an empty database."""
        with self.read() as connection:
            if not sa.inspect(connection).has_table("alembic_version"):
                return None
            revision: str | None = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
            return revision

    def close(self) -> None:
        self._engine.dispose()


def is_outage(error: BaseException) -> bool:
    """Whether the database is locked, full, unreachable or restarting, so that a retry may succeed."""
    if isinstance(error, sa.exc.TimeoutError):  # the connection pool is exhausted
        return True
    if not isinstance(error, sa.exc.DBAPIError):
        return False
    if error.connection_invalidated or _sqlstate(error) in _AWAY:
        return True
    # On SQLite invalid SQL is an OperationalError too; a retry does not help.
    return isinstance(error, sa.exc.OperationalError) and _sqlite_name(error) != "SQLITE_ERROR"


def is_full(error: BaseException) -> bool:
    """Whether the database has no room left on its disk."""
    full = isinstance(error, sa.exc.DBAPIError)
    return full and (_sqlite_name(error) == "SQLITE_FULL" or _sqlstate(error) == "53100")


# https://www.postgresql.org/docs/current/errcodes-appendix.html; psycopg has these as its InternalError.
_AWAY = {
    "25006",  # read only: a standby before it takes over
    "25P03",  # transaction ended by idle_in_transaction_session_timeout
}


def _sqlite_name(error: BaseException) -> str | None:
    name: str | None = getattr(getattr(error, "orig", None), "sqlite_errorname", None)
    return name


def _sqlstate(error: BaseException) -> str | None:
    state: str | None = getattr(getattr(error, "orig", None), "sqlstate", None)
    return state


def persist(action: Callable[[], Result], patience_s: float, pause_s: float = 0.5) -> Result:
    """The result of `action`, retried for up to `patience_s` seconds while the database is locked or unreachable.

    Raises:
        SQLAlchemyError: the last outage after `patience_s`; any other error at once.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return action()
        except sa.exc.SQLAlchemyError as error:
            if not is_outage(error) or time.monotonic() + pause_s > deadline:
                raise
            time.sleep(pause_s)


def _sqlite_engine(url: URL) -> Engine:
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(url)
    sa.event.listen(engine, "connect", _configure_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _postgresql_engine(url: URL) -> Engine:
    # A vanished host is detected in seconds instead of TCP's 15 minutes. The URL may override these.
    # Source: https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-KEEPALIVES
    timeouts = {
        "connect_timeout": 10,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 20_000,
    }
    engine = sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        isolation_level="READ COMMITTED",
        pool_pre_ping=True,
        pool_timeout=BUSY_TIMEOUT_MS / 1000,
        connect_args={name: value for name, value in timeouts.items() if name not in url.query},
    )
    sa.event.listen(engine, "connect", _configure_postgresql)
    return engine


def _configure_postgresql(connection: Any, _record: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = {BUSY_TIMEOUT_MS}")
        cursor.execute(f"SET statement_timeout = {STATEMENT_TIMEOUT_MS}")
        cursor.execute(f"SET idle_in_transaction_session_timeout = {IDLE_TIMEOUT_MS}")
    connection.commit()


def _wait_for_other_migrations(connection: Connection) -> None:
    # Migrations may take longer than the statements of a request.
    for timeout in ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout"):
        connection.exec_driver_sql(f"SET LOCAL {timeout} = {MIGRATION_TIMEOUT_MS}")
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATION_LOCK)))


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # Autocommit mode: _begin_sqlite opens transactions, not the driver.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    _use_wal(cursor)
    # FULL: committed transactions survive a power cut. Source: https://sqlite.org/pragma.html#pragma_synchronous
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _use_wal(cursor: sqlite3.Cursor) -> None:
    # The first connection converts the file; a concurrent one fails at once, regardless of busy_timeout.
    deadline = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            # The low byte is the primary code; only a lock is temporary.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    # A deferred transaction that reads and then writes fails at once if another transaction wrote in between,
    # without waiting for busy_timeout. So writers take the lock at the start.
    read_only = connection.get_execution_options().get("qlora_read", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
