"""Database errors that are outages, and the retries of `persist`."""

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from qlora_service.store import database as module
from qlora_service.store.database import Database, is_full, is_outage, persist
from qlora_service.store.jobs import get_job
from qlora_service.store.tables import jobs
from tests.control_plane import add_job
from tests.postgres import PostgresServer
from tests.qlora_service.store._databases import postgresql, sqlite

__all__ = ["postgresql", "sqlite"]


def error_of(action: Callable[[], Any]) -> SQLAlchemyError:
    """The database error that `action` raises."""
    with pytest.raises(SQLAlchemyError) as caught:
        action()
    return caught.value


def run_sql(database: Database, statement: str) -> None:
    with database.write() as connection:
        connection.exec_driver_sql(statement)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Databases opened by the test wait 0.2 s for a lock or a free connection, instead of 10 s."""
    monkeypatch.setattr(module, "BUSY_TIMEOUT_MS", 200)


@pytest.mark.usefixtures("impatient")
def test_blocked_write_raises_an_outage_within_its_timeout(database: Database) -> None:
    add_job(database)
    other = Database(database.url)
    with database.write() as connection:
        connection.execute(sa.update(jobs).values(step=1))
        started = time.monotonic()
        error = error_of(lambda: run_sql(other, "UPDATE jobs SET step = 2"))
        assert time.monotonic() - started < 5
    assert is_outage(error), repr(error)
    assert not is_full(error)
    run_sql(other, "UPDATE jobs SET step = 2")
    other.close()


@pytest.mark.parametrize("statement", ["SELECT * FROM nothing", "INSERT INTO jobs (id) VALUES ('x')", "SELEKT"])
def test_invalid_statement_is_no_outage_and_is_not_retried(database: Database, statement: str) -> None:
    calls = []

    def action() -> None:
        calls.append(1)
        run_sql(database, statement)

    assert not is_outage(error_of(lambda: persist(action, patience_s=5, pause_s=0.01)))
    assert len(calls) == 1


def test_operating_system_errors_are_no_outages() -> None:
    assert not is_outage(OSError(28, "No space left on device"))
    assert not is_full(OSError(28, "No space left on device"))


def test_full_sqlite_is_an_outage_and_full(sqlite: Database) -> None:
    def fill() -> None:
        with sqlite.write() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 3")
            connection.exec_driver_sql("CREATE TABLE t AS SELECT zeroblob(1000000)")

    error = error_of(fill)
    assert is_outage(error)
    assert is_full(error)


@pytest.mark.parametrize(
    ("state", "outage"),
    [
        ("53100", True),  # disk full
        ("53300", True),  # too many connections
        ("57P03", True),  # starting up
        ("40P01", True),  # deadlock
        ("40001", True),  # serialization failure
        ("25006", True),  # a standby
        ("42501", False),  # no permission
        ("22001", False),  # value too long
        ("XX001", False),  # corrupted
    ],
)
def test_postgresql_error_is_classified_by_its_sqlstate(postgresql: Database, state: str, outage: bool) -> None:
    error = error_of(lambda: run_sql(postgresql, f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{state}'; END $$"))
    assert is_outage(error) is outage
    assert is_full(error) is (state == "53100")


def test_deadlock_is_an_outage_of_one_transaction(postgresql: Database) -> None:
    ids = [add_job(postgresql), add_job(postgresql)]
    barrier = threading.Barrier(2)
    failures: list[BaseException] = []

    def lock(order: list[str]) -> None:
        def update(connection: Connection, job_id: str) -> None:
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(step=1))

        try:
            with postgresql.write() as connection:
                update(connection, order[0])
                barrier.wait()
                update(connection, order[1])
        except SQLAlchemyError as error:
            failures.append(error)

    threads = [threading.Thread(target=lock, args=(order,)) for order in (ids, ids[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [is_outage(failure) for failure in failures] == [True]


def test_idle_transaction_loses_its_locks(postgresql: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_TIMEOUT_MS", 200)
    add_job(postgresql)
    idle = Database(postgresql.url)

    def pause_in_transaction() -> None:
        with idle.write() as connection:
            connection.execute(sa.update(jobs).values(step=1))
            time.sleep(0.5)
            run_sql(postgresql, "UPDATE jobs SET step = 2")
            connection.execute(sa.update(jobs).values(step=3))

    assert is_outage(error_of(pause_in_transaction))
    with postgresql.read() as connection:
        assert connection.execute(sa.select(jobs.c.step)).scalar_one() == 2
    idle.close()


def test_endless_statement_is_an_outage(postgresql: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STATEMENT_TIMEOUT_MS", 200)
    own = Database(postgresql.url)
    assert is_outage(error_of(lambda: run_sql(own, "SELECT pg_sleep(20)")))
    own.close()


@pytest.mark.usefixtures("impatient")
def test_more_transactions_than_connections_are_an_outage(postgresql: Database) -> None:
    own = Database(postgresql.url)
    with contextlib.ExitStack() as held:
        assert is_outage(error_of(lambda: [held.enter_context(own.read()) for _ in range(100)]))
    own.close()


def test_connections_that_the_server_closed_are_replaced(postgresql: Database, postgres: PostgresServer) -> None:
    job_id = add_job(postgresql)
    postgres.admin("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid != pg_backend_pid()")
    run_sql(postgresql, f"UPDATE jobs SET step = 7 WHERE id = '{job_id}'")
    with postgresql.read() as connection:
        assert get_job(connection, job_id).step == 7


def test_persist_retries_a_write_until_the_server_is_back(postgresql: Database, postgres: PostgresServer) -> None:
    add_job(postgresql)

    def write() -> None:
        run_sql(postgresql, "UPDATE jobs SET step = 2")

    postgres.stop()
    try:
        error = error_of(write)
        writer = threading.Thread(target=persist, args=(write, 30, 0.05))
        writer.start()
        time.sleep(0.3)
        assert writer.is_alive()
    finally:
        postgres.start()
    writer.join()
    assert is_outage(error), repr(error)
    with postgresql.read() as connection:
        assert connection.execute(sa.select(jobs.c.step)).scalar_one() == 2


def test_persist_stops_retrying_after_its_patience(sqlite: Database) -> None:
    blocker = sqlite3.connect(sqlite.url.removeprefix("sqlite:///"), isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    calls = []

    def action() -> None:
        calls.append(1)
        with sqlite.read() as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout = 1")
            connection.exec_driver_sql("COMMIT")
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    started = time.monotonic()
    assert is_outage(error_of(lambda: persist(action, patience_s=0.3, pause_s=0.05)))
    assert 0.1 < time.monotonic() - started < 3
    assert len(calls) > 1
    blocker.close()
