import threading
import time
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, SQLAlchemyError, StatementError

from qlora_service.store.database import Database
from qlora_service.store.jobs import get_job
from qlora_service.store.tables import datasets, events, jobs
from tests.control_plane import START, add_job, stored_rows
from tests.qlora_service.store._databases import postgresql, pragma, sqlite

__all__ = ["postgresql", "sqlite"]


# --- connections


def test_sqlite_connections_are_durable_and_check_foreign_keys(sqlite: Database) -> None:
    assert pragma(sqlite, "journal_mode") == "wal"
    assert pragma(sqlite, "synchronous") == 2  # FULL
    assert pragma(sqlite, "foreign_keys") == 1
    assert pragma(sqlite, "busy_timeout") == 10_000


def test_row_with_a_dangling_foreign_key_is_refused(database: Database) -> None:
    with pytest.raises(IntegrityError), database.write() as connection:
        connection.execute(events.insert().values(job_id="job_none", at=START, type="log", data={}))
    assert not any(stored_rows(database).values())


def test_event_numbers_are_never_reused(database: Database) -> None:
    job_id = add_job(database)

    def append() -> int:
        with database.write() as connection:
            row = connection.execute(
                events.insert().values(job_id=job_id, at=START, type="log", data={}).returning(events.c.seq)
            )
            return int(row.scalar_one())

    last = append()
    with database.write() as connection:
        connection.execute(events.delete())
    assert append() > last


def test_parent_directories_are_created(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'a/b/state.db'}")
    database.migrate()
    database.close()
    assert (tmp_path / "a/b/state.db").is_file()


def test_url_of_another_database_is_refused() -> None:
    with pytest.raises(ValueError, match=r"names 'mysql'.*postgresql://"):
        Database("mysql://root@localhost/x")


def test_url_scheme_postgres_means_postgresql(postgres_url: str) -> None:
    database = Database(postgres_url.replace("postgresql:", "postgres:"))
    job_id = add_job(database)
    with database.read() as connection:
        assert get_job(connection, job_id).id == job_id
    database.close()


# --- transactions


def test_write_that_raises_is_rolled_back(database: Database) -> None:
    job_id = add_job(database)
    before = stored_rows(database)

    def write_then_fail() -> None:
        with database.write() as connection:
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(step=5))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        write_then_fail()
    assert stored_rows(database) == before


def test_reader_sees_one_snapshot_and_does_not_wait_for_writers(database: Database) -> None:
    job_id = add_job(database)
    step = sa.select(jobs.c.step).where(jobs.c.id == job_id)
    with database.read() as reading:
        assert reading.execute(step).scalar_one() == 0
        with database.write() as writing:
            writing.execute(sa.update(jobs).values(step=1))
            started = time.monotonic()
            with database.read() as other:
                assert other.execute(step).scalar_one() == 0
            assert time.monotonic() - started < 1
        assert reading.execute(step).scalar_one() == 0
    with database.read() as reading:
        assert reading.execute(step).scalar_one() == 1


def test_concurrent_writers_lose_no_update(database: Database) -> None:
    add_job(database)

    def count() -> None:
        for _ in range(20):
            with database.write() as connection:
                # Read, then write: two of these transactions at once would lose one of the two sums. SQLite takes its
                # write lock at the start of the transaction, PostgreSQL locks the rows it reads.
                step = connection.execute(sa.select(jobs.c.step).with_for_update()).scalar_one()
                connection.execute(sa.update(jobs).values(step=step + 1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as connection:
        assert connection.execute(sa.select(jobs.c.step)).scalar_one() == 80


def test_closed_database_holds_no_file_open(sqlite: Database) -> None:
    add_job(sqlite)
    path = sqlite.url.removeprefix("sqlite:///")
    sqlite.close()
    open_files = {str(descriptor.resolve()) for descriptor in Path("/proc/self/fd").iterdir()}
    assert not {name for name in open_files if name.startswith(path)}


def test_reader_cannot_write_to_postgresql(postgresql: Database) -> None:
    with pytest.raises(SQLAlchemyError, match="read-only transaction"), postgresql.read() as connection:
        connection.execute(events.delete())


# --- times


def test_time_is_returned_in_utc(database: Database) -> None:
    add_job(database)
    local = datetime(2026, 7, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    with database.write() as connection:
        connection.execute(sa.update(datasets).values(created_at=local))
    with database.read() as connection:
        stored = connection.execute(sa.select(datasets.c.created_at)).scalar_one()
    assert stored == local
    assert stored.tzinfo is UTC


def test_time_without_a_zone_is_refused(database: Database) -> None:
    add_job(database)
    with pytest.raises(StatementError, match="has no time zone"), database.write() as connection:
        connection.execute(sa.update(jobs).values(started_at=datetime(2026, 1, 1)))
