from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from qlora_service.errors import StorageFull
from qlora_service.store.database import Database
from qlora_service.store.datasets import insert_dataset
from qlora_service.store.storage import check_room, stored_bytes
from qlora_service.store.tables import datasets, jobs, uploads
from tests.control_plane import START, add_job, each_database, new_dataset

__all__ = ["each_database"]

DATASET_BYTES = new_dataset().report.bytes
GIB = 2**30


def stored(database: Database, project: str = "team-a") -> int:
    with database.read() as connection:
        return stored_bytes(connection, project)


def set_columns(database: Database, table: sa.Table, id_: str, **values: Any) -> None:
    with database.write() as connection:
        connection.execute(sa.update(table).where(table.c.id == id_).values(values))


def add_upload(database: Database, status: str, size: int) -> None:
    row = {
        "id": f"upload_{status}", "project": "team-a", "status": status, "filename": "rows.jsonl", "bytes": size,
        "purpose": "fine-tune", "mime_type": "application/jsonl", "created_at": START, "expires_at": START,
    }  # fmt: skip
    with database.write() as connection:
        connection.execute(uploads.insert().values(row))


def test_project_without_anything_stores_nothing(database: Database) -> None:
    assert stored(database) == 0


def test_datasets_count_until_they_are_deleted(database: Database) -> None:
    with database.write() as connection:
        first = insert_dataset(connection, new_dataset("a" * 64, project="team-a"))
        insert_dataset(connection, new_dataset("b" * 64, project="team-a"))
        insert_dataset(connection, new_dataset("b" * 64, project="team-b"))
    assert stored(database) == 2 * DATASET_BYTES
    set_columns(database, datasets, first.id, deleted_at=START)
    assert stored(database) == DATASET_BYTES


def test_pending_uploads_count_with_their_announced_bytes(database: Database) -> None:
    for status, size in {"pending": 5 * GIB, "completed": 7, "cancelled": 11, "expired": 13}.items():
        add_upload(database, status, size)
    assert stored(database) == 5 * GIB


def test_published_files_count_until_they_are_withdrawn(database: Database) -> None:
    succeeded, failed, queued = (add_job(database, project="team-a") for _ in range(3))
    add_job(database, project="team-b")
    # 3 GiB exceed a signed 32-bit integer, the type "integer" of PostgreSQL.
    set_columns(database, jobs, succeeded, result={"attempt": 1, "published_bytes": 3 * GIB})
    set_columns(database, jobs, failed, error={"code": "job_failed", "details": {"kept_bytes": 1000}})
    assert stored(database) == DATASET_BYTES + 3 * GIB + 1000
    set_columns(database, jobs, succeeded, withdrawn_at=START)
    assert stored(database) == DATASET_BYTES + 1000
    assert queued


def test_storage_may_reach_the_limit_but_not_exceed_it(database: Database) -> None:
    add_job(database, project="team-a")
    with database.read() as connection:
        check_room(connection, "team-a", None, more_bytes=2**60)
        check_room(connection, "team-a", DATASET_BYTES + 8, more_bytes=8)
        check_room(connection, "team-b", 8, more_bytes=8)
        with pytest.raises(StorageFull, match="delete datasets") as caught:
            check_room(connection, "team-a", DATASET_BYTES + 8, more_bytes=9)
    assert caught.value.details == {"stored_bytes": DATASET_BYTES, "max_stored_bytes": DATASET_BYTES + 8}
