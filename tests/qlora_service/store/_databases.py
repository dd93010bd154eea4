"""Databases of one kind, for tests that do not run on both."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_service.store.database import Database
from tests.control_plane import sqlite_database


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Database]:
    """A migrated SQLite file."""
    database = sqlite_database(tmp_path)
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
