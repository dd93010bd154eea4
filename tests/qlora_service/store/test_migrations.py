"""The migrated schema, on both databases and from several processes."""

import re
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import OperationalError

from qlora_service.domain.keys import LOCAL_PROJECT
from qlora_service.store.database import Database
from qlora_service.store.migrations import HEAD
from qlora_service.store.tables import metadata
from tests.control_plane import add_job, run_in_processes, stored_rows
from tests.postgres import PostgresServer
from tests.qlora_service.store._databases import pragma, sqlite

__all__ = ["sqlite"]


MIGRATE = """
from qlora_service.store.database import Database

def work(url):
    database = Database(url)
    database.migrate()
    with database.read() as connection:
        return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars().all()
"""


def statements(database: Database) -> dict[str, list[str]]:
    """The sorted parts of every CREATE statement: ALTER TABLE writes a new column last."""
    query = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name != 'alembic_version'"
    with database.read() as connection:
        rows = connection.exec_driver_sql(query).all()
    return {name: sorted(part.strip(" \t)") for part in re.split("[,\n]", sql.replace('"', ""))) for name, sql in rows}


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


def test_migrated_schema_is_that_of_the_tables(database: Database) -> None:
    def ignore_json_defaults(_context: Any, _inspected: Any, column: sa.Column[Any], *_defaults: Any) -> bool | None:
        # PostgreSQL cannot compare JSON; the next test compares all of SQLite's schema text.
        return False if isinstance(column.type, sa.JSON) else None

    with database.read() as connection:
        options = {"compare_type": True, "compare_server_default": ignore_json_defaults}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []


def test_migrated_sqlite_file_is_what_the_tables_would_create(sqlite: Database, tmp_path: Path) -> None:
    """Compares the CREATE statements: alembic's comparison does not see `AUTOINCREMENT`."""
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


def test_head_is_the_newest_revision() -> None:
    assert ScriptDirectory.from_config(alembic_config()).get_heads() == [HEAD]


def test_downgrade_to_owners_and_upgrade_keep_every_row(database: Database) -> None:
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


@pytest.mark.slow
def test_concurrent_migrations_all_end_with_the_newest_schema(tmp_path: Path) -> None:
    for attempt in range(3):
        url = f"sqlite:///{tmp_path / str(attempt) / 'state.db'}"
        # Six processes rather than two make a collision likelier.
        versions = run_in_processes(MIGRATE, url, processes=6)
        assert all(version == versions[0] and len(version) == 1 for version in versions)


def test_concurrent_migrations_of_postgresql_all_end_with_the_newest_schema(postgres: PostgresServer) -> None:
    url = postgres.create("migrated_by_six")
    versions = run_in_processes(MIGRATE, url, processes=6)
    assert all(version == versions[0] and len(version) == 1 for version in versions)
    postgres.drop("migrated_by_six")


def test_new_sqlite_file_is_opened_once_another_process_releases_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    # The lock of a process that is switching the file to WAL: SQLite refuses other connections without waiting.
    holder.execute("BEGIN IMMEDIATE")

    def release() -> None:
        holder.rollback()
        holder.close()

    timer = threading.Timer(0.3, release)
    timer.start()
    database = Database(f"sqlite:///{path}")
    database.migrate()
    timer.join()
    assert pragma(database, "journal_mode") == "wal"
    database.close()


def test_failed_migration_is_rolled_back(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'state.db'}")
    with database.write() as connection:
        connection.exec_driver_sql("CREATE TABLE events (something TEXT)")
    with pytest.raises(OperationalError, match="events already exists"):
        database.migrate()
    with database.read() as connection:
        assert sa.inspect(connection).get_table_names() == ["events"]
    database.close()
