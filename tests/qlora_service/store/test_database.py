import contextlib
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError, StatementError

from qlora_service.domain.keys import LOCAL_PROJECT
from qlora_service.store import database as module
from qlora_service.store.database import Database, is_full, is_outage, persist
from qlora_service.store.jobs import get_job
from qlora_service.store.migrations import HEAD
from qlora_service.store.tables import datasets, events, jobs, metadata
from tests.control_plane import START, add_job, run_in_processes, stored_rows
from tests.postgres import PostgresServer

MIGRATE = """
from qlora_service.store.database import Database

def work(url):
    database = Database(url)
    database.migrate()
    with database.read() as connection:
        return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars().all()
"""


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Database]:
    """A migrated SQLite file."""
    database = Database(f"sqlite:///{tmp_path / 'state.db'}")
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def postgresql(postgres_url: str) -> Iterator[Database]:
    """A migrated PostgreSQL database."""
    database = Database(postgres_url)
    yield database
    database.close()


def pragma(database: Database, name: str) -> object:
    with database.read() as connection:
        return connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()


def statements(database: Database) -> dict[str, list[str]]:
    """The parts of every CREATE statement, without their order: ALTER TABLE writes a new column last."""
    query = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name != 'alembic_version'"
    with database.read() as connection:
        rows = connection.exec_driver_sql(query).all()
    return {name: sorted(part.strip(" \t)") for part in re.split("[,\n]", sql.replace('"', ""))) for name, sql in rows}


def fails(action: Callable[[], Any]) -> SQLAlchemyError:
    """What `action` raises."""
    with pytest.raises(SQLAlchemyError) as caught:
        action()
    return caught.value


def alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", "qlora_service.store:migrations")
    config.set_main_option("path_separator", "os")
    return config


def downgrade(database: Database, revision: str) -> None:
    config = alembic_config()
    with database.write() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, revision)


def run_sql(database: Database, statement: str) -> None:
    with database.write() as connection:
        connection.exec_driver_sql(statement)


# --- the schema


def test_migrated_schema_is_that_of_the_tables(database: Database) -> None:
    def json_aside(_context: Any, _inspected: Any, column: sa.Column[Any], *_defaults: Any) -> bool | None:
        # PostgreSQL cannot compare JSON; "no difference" here, the SQLite file is compared to the letter below.
        return False if isinstance(column.type, sa.JSON) else None

    with database.read() as connection:
        options = {"compare_type": True, "compare_server_default": json_aside}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []


def test_migrated_sqlite_file_is_what_the_tables_would_create(sqlite: Database, tmp_path: Path) -> None:
    """To the letter: the comparison above does not see `AUTOINCREMENT`."""
    direct = Database(f"sqlite:///{tmp_path / 'direct.db'}")
    with direct.write() as connection:
        metadata.create_all(connection)
    expected = {name: [part for part in parts if part] for name, parts in statements(direct).items()}
    assert {name: [part for part in parts if part] for name, parts in statements(sqlite).items()} == expected
    direct.close()


def test_migrating_again_changes_nothing(database: Database) -> None:
    add_job(database)
    before = stored_rows(database)
    database.migrate()
    assert stored_rows(database) == before


def test_newest_revision_is_the_one_that_is_named() -> None:
    assert ScriptDirectory.from_config(alembic_config()).get_heads() == [HEAD]


def test_schema_without_projects_and_back_keeps_every_row(database: Database) -> None:
    add_job(database)
    before = stored_rows(database)
    downgrade(database, "0002")
    with database.read() as connection:
        assert connection.exec_driver_sql("SELECT owner FROM jobs").scalar_one() == LOCAL_PROJECT
    database.migrate()
    assert stored_rows(database) == before


def test_downgrade_leaves_an_empty_schema_that_can_be_migrated_again(database: Database) -> None:
    add_job(database)
    downgrade(database, "base")
    with database.read() as connection:
        assert set(sa.inspect(connection).get_table_names()) == {"alembic_version"}
    database.migrate()
    assert not any(stored_rows(database).values())


def test_processes_that_migrate_at_once_all_find_the_newest_schema(tmp_path: Path) -> None:
    for attempt in range(3):
        url = f"sqlite:///{tmp_path / str(attempt) / 'state.db'}"
        # Six rather than two: the more there are, the likelier they meet.
        versions = run_in_processes(MIGRATE, url, processes=6)
        assert all(version == versions[0] and len(version) == 1 for version in versions)


def test_processes_that_migrate_one_postgresql_at_once_all_find_the_newest_schema(postgres: PostgresServer) -> None:
    url = postgres.create("migrated_by_six")
    versions = run_in_processes(MIGRATE, url, processes=6)
    assert all(version == versions[0] and len(version) == 1 for version in versions)
    postgres.drop("migrated_by_six")


def test_new_sqlite_file_is_opened_as_soon_as_another_process_lets_go_of_it(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    # The lock of a process that is about to change the file to WAL. Who comes then is turned away at once.
    holder.execute("BEGIN IMMEDIATE")

    def let_go() -> None:
        holder.rollback()
        holder.close()

    timer = threading.Timer(0.3, let_go)
    timer.start()
    database = Database(f"sqlite:///{path}")
    database.migrate()
    timer.join()
    assert pragma(database, "journal_mode") == "wal"
    database.close()


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


def test_every_connection_is_durable_and_checks_references(sqlite: Database) -> None:
    assert pragma(sqlite, "journal_mode") == "wal"
    assert pragma(sqlite, "synchronous") == 2  # FULL
    assert pragma(sqlite, "foreign_keys") == 1
    assert pragma(sqlite, "busy_timeout") == 10_000


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
                # Read, then write: two such transactions at once would lose one of the two sums. SQLite's hold the
                # one write lock from the start, PostgreSQL's lock what they read.
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
    held = {str(descriptor.resolve()) for descriptor in Path("/proc/self/fd").iterdir()}
    assert not {name for name in held if name.startswith(path)}


def test_reader_cannot_write_to_postgresql(postgresql: Database) -> None:
    with pytest.raises(SQLAlchemyError, match="read-only transaction"), postgresql.read() as connection:
        connection.execute(events.delete())


# --- outages, and what is none


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Databases opened from now on wait for tenths of a second where they would for tens of seconds."""
    monkeypatch.setattr(module, "BUSY_TIMEOUT_MS", 200)


@pytest.mark.usefixtures("impatient")
def test_blocked_write_becomes_an_outage_and_not_a_hang(database: Database) -> None:
    add_job(database)
    other = Database(database.url)
    with database.write() as connection:
        connection.execute(sa.update(jobs).values(step=1))
        started = time.monotonic()
        error = fails(lambda: run_sql(other, "UPDATE jobs SET step = 2"))
        assert time.monotonic() - started < 5
    assert is_outage(error), repr(error)
    assert not is_full(error)
    run_sql(other, "UPDATE jobs SET step = 2")
    other.close()


@pytest.mark.parametrize("statement", ["SELECT * FROM nothing", "INSERT INTO jobs (id) VALUES ('x')", "SELEKT"])
def test_wrong_statement_is_a_defect_and_raised_at_once(database: Database, statement: str) -> None:
    tries = []

    def action() -> None:
        tries.append(1)
        run_sql(database, statement)

    assert not is_outage(fails(lambda: persist(action, patience_s=5, pause_s=0.01)))
    assert len(tries) == 1


def test_other_errors_are_no_outages() -> None:
    assert not is_outage(OSError(28, "No space left on device"))
    assert not is_full(OSError(28, "No space left on device"))


def test_full_sqlite_is_an_outage_that_says_so(sqlite: Database) -> None:
    def fill() -> None:
        with sqlite.write() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 3")
            connection.exec_driver_sql("CREATE TABLE t AS SELECT zeroblob(1000000)")

    error = fails(fill)
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
def test_postgresql_error_is_judged_by_its_state(postgresql: Database, state: str, outage: bool) -> None:
    error = fails(lambda: run_sql(postgresql, f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{state}'; END $$"))
    assert is_outage(error) is outage
    assert is_full(error) is (state == "53100")


def test_transactions_that_wait_for_each_other_are_an_outage_of_one(postgresql: Database) -> None:
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


def test_transaction_that_stands_still_loses_its_locks(postgresql: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_TIMEOUT_MS", 200)
    add_job(postgresql)
    frozen = Database(postgresql.url)

    def stand_still() -> None:
        with frozen.write() as connection:
            connection.execute(sa.update(jobs).values(step=1))
            time.sleep(0.5)
            run_sql(postgresql, "UPDATE jobs SET step = 2")
            connection.execute(sa.update(jobs).values(step=3))

    assert is_outage(fails(stand_still))
    with postgresql.read() as connection:
        assert connection.execute(sa.select(jobs.c.step)).scalar_one() == 2
    frozen.close()


def test_endless_statement_is_an_outage(postgresql: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STATEMENT_TIMEOUT_MS", 200)
    own = Database(postgresql.url)
    assert is_outage(fails(lambda: run_sql(own, "SELECT pg_sleep(20)")))
    own.close()


@pytest.mark.usefixtures("impatient")
def test_more_transactions_than_connections_are_an_outage(postgresql: Database) -> None:
    own = Database(postgresql.url)
    with contextlib.ExitStack() as held:
        assert is_outage(fails(lambda: [held.enter_context(own.read()) for _ in range(100)]))
    own.close()


def test_connections_that_the_server_closed_are_replaced_unnoticed(
    postgresql: Database, postgres: PostgresServer
) -> None:
    job_id = add_job(postgresql)
    postgres.admin("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid != pg_backend_pid()")
    run_sql(postgresql, f"UPDATE jobs SET step = 7 WHERE id = '{job_id}'")
    with postgresql.read() as connection:
        assert get_job(connection, job_id).step == 7


def test_write_is_persisted_over_a_restart_of_the_server(postgresql: Database, postgres: PostgresServer) -> None:
    add_job(postgresql)

    def write() -> None:
        run_sql(postgresql, "UPDATE jobs SET step = 2")

    postgres.stop()
    try:
        error = fails(write)
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


def test_patience_ends(sqlite: Database) -> None:
    blocker = sqlite3.connect(sqlite.url.removeprefix("sqlite:///"), isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    tries = []

    def action() -> None:
        tries.append(1)
        with sqlite.read() as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout = 1")
            connection.exec_driver_sql("COMMIT")
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    started = time.monotonic()
    assert is_outage(fails(lambda: persist(action, patience_s=0.3, pause_s=0.05)))
    assert 0.1 < time.monotonic() - started < 3
    assert len(tries) > 1
    blocker.close()


def test_url_of_another_database_is_refused() -> None:
    with pytest.raises(ValueError, match=r"names 'mysql'.*postgresql://"):
        Database("mysql://root@localhost/x")


def test_postgres_is_a_name_of_postgresql_too(postgres_url: str) -> None:
    database = Database(postgres_url.replace("postgresql:", "postgres:"))
    job_id = add_job(database)
    with database.read() as connection:
        assert get_job(connection, job_id).id == job_id
    database.close()


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
