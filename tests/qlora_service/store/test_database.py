import threading
import time
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy.exc import IntegrityError, OperationalError, StatementError

from qlora_service.store.database import Database
from qlora_service.store.tables import datasets, events, jobs, metadata
from tests.control_plane import START, add_job, run_together, stored_rows

MIGRATE = """
from qlora_service.store.database import Database

def work(url):
    database = Database(url)
    database.migrate()
    with database.read() as connection:
        return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars().all()
"""


def pragma(database: Database, name: str) -> object:
    with database.read() as connection:
        return connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()


def statements(database: Database) -> dict[str, list[str]]:
    """The lines of every CREATE statement, without their order."""
    query = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name != 'alembic_version'"
    with database.read() as connection:
        rows = connection.exec_driver_sql(query).all()
    return {name: sorted(line.strip(" \t,") for line in sql.splitlines()) for name, sql in rows}


# --- the schema


def test_migrated_schema_is_that_of_the_tables(database: Database) -> None:
    with database.read() as connection:
        options = {"compare_type": True, "compare_server_default": True}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []


def test_migrated_sqlite_file_is_what_the_tables_would_create(database: Database, tmp_path: Path) -> None:
    """To the letter: the comparison above does not see `AUTOINCREMENT`."""
    direct = Database(f"sqlite:///{tmp_path / 'direct.db'}")
    with direct.write() as connection:
        metadata.create_all(connection)
    assert statements(database) == statements(direct)
    direct.close()


def test_migrating_again_changes_nothing(database: Database) -> None:
    add_job(database)
    before = stored_rows(database)
    database.migrate()
    assert stored_rows(database) == before


def test_downgrade_leaves_an_empty_schema_that_can_be_migrated_again(database: Database) -> None:
    add_job(database)
    config = Config()
    config.set_main_option("script_location", "qlora_service.store:migrations")
    config.set_main_option("path_separator", "os")
    with database.write() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    with database.read() as connection:
        assert set(sa.inspect(connection).get_table_names()) == {"alembic_version"}
    database.migrate()
    assert not any(stored_rows(database).values())


def test_processes_that_migrate_at_once_all_find_the_newest_schema(tmp_path: Path) -> None:
    for attempt in range(3):
        url = f"sqlite:///{tmp_path / str(attempt) / 'state.db'}"
        # Six rather than two: the more there are, the likelier they meet.
        versions = run_together(MIGRATE, url, processes=6)
        assert all(version == versions[0] and len(version) == 1 for version in versions)


def test_migration_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'state.db'}")
    with database.write() as connection:
        connection.exec_driver_sql("CREATE TABLE events (something TEXT)")
    with pytest.raises(OperationalError, match="events already exists"):
        database.migrate()
    with database.read() as connection:
        assert sa.inspect(connection).get_table_names() == ["events"]
    database.close()


def test_parent_directories_are_made(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'a/b/state.db'}")
    database.migrate()
    database.close()
    assert (tmp_path / "a/b/state.db").is_file()


# --- SQLite as we need it


def test_every_connection_is_durable_and_checks_references(database: Database) -> None:
    assert pragma(database, "journal_mode") == "wal"
    assert pragma(database, "synchronous") == 2  # FULL
    assert pragma(database, "foreign_keys") == 1
    assert pragma(database, "busy_timeout") == 10_000


def test_row_that_refers_to_nothing_is_refused(database: Database) -> None:
    with pytest.raises(IntegrityError), database.write() as connection:
        connection.execute(events.insert().values(job_id="job_none", at=START, type="log", data={}))
    assert not any(stored_rows(database).values())


def test_event_numbers_are_never_used_again(database: Database) -> None:
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


# --- transactions


def test_write_that_raises_is_undone(database: Database) -> None:
    job_id = add_job(database)
    before = stored_rows(database)

    def write_then_fail() -> None:
        with database.write() as connection:
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(step=5))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        write_then_fail()
    assert stored_rows(database) == before


def test_reader_sees_one_moment_and_waits_for_no_writer(database: Database) -> None:
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


def test_writers_take_turns_and_lose_no_update(database: Database) -> None:
    add_job(database)

    def count() -> None:
        for _ in range(20):
            with database.write() as connection:
                # Read, then write: two such transactions at once would lose one of the two sums.
                step = connection.execute(sa.select(jobs.c.step)).scalar_one()
                connection.execute(sa.update(jobs).values(step=step + 1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as connection:
        assert connection.execute(sa.select(jobs.c.step)).scalar_one() == 80


def test_closed_database_holds_no_file_open(database: Database) -> None:
    add_job(database)
    path = database.url.removeprefix("sqlite:///")
    database.close()
    held = {str(descriptor.resolve()) for descriptor in Path("/proc/self/fd").iterdir()}
    assert not {name for name in held if name.startswith(path)}


# --- times


def test_time_comes_back_as_the_same_moment_in_utc(database: Database) -> None:
    add_job(database)
    abroad = datetime(2026, 7, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    with database.write() as connection:
        connection.execute(sa.update(datasets).values(created_at=abroad))
    with database.read() as connection:
        stored = connection.execute(sa.select(datasets.c.created_at)).scalar_one()
    assert stored == abroad
    assert stored.tzinfo is UTC


def test_time_without_a_zone_is_refused(database: Database) -> None:
    add_job(database)
    with pytest.raises(StatementError, match="has no time zone"), database.write() as connection:
        connection.execute(sa.update(jobs).values(started_at=datetime(2026, 1, 1)))
