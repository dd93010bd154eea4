from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from qlora_service.domain.uploads import Part, Upload, UploadStatus
from qlora_service.errors import NotFound
from qlora_service.store.database import Database
from qlora_service.store.uploads import (
    close_upload,
    delete_parts,
    expire_uploads,
    get_upload,
    insert_part,
    insert_upload,
    list_parts,
)
from tests.control_plane import START

HOUR = timedelta(hours=1)
UPLOAD = Upload(
    "upload_1",
    "local",
    UploadStatus.PENDING,
    "a.jsonl",
    "fine-tune",
    "application/jsonl",
    10,
    None,
    START,
    START + HOUR,
)


def add(database: Database, upload: Upload = UPLOAD, parts: int = 1) -> None:
    with database.write() as connection:
        insert_upload(connection, upload)
        for number in range(parts):
            insert_part(connection, Part(f"part_{upload.id}_{number}", upload.id, 5, "0" * 64, START))


def test_upload_is_returned_as_it_was_stored(database: Database) -> None:
    add(database)
    with database.read() as connection:
        assert get_upload(connection, "upload_1", project="local") == UPLOAD
        assert [part.id for part in list_parts(connection, "upload_1")] == ["part_upload_1_0"]


def test_another_projects_upload_is_not_found(database: Database) -> None:
    add(database)
    with database.read() as connection, pytest.raises(NotFound, match="'upload_1'"):
        get_upload(connection, "upload_1", project="other")


def test_uploads_of_every_project_expire_after_their_time(database: Database) -> None:
    add(database)
    add(database, replace(UPLOAD, id="upload_2", project="other"))
    add(database, replace(UPLOAD, id="upload_3", expires_at=START + 3 * HOUR))
    with database.write() as connection:
        assert expire_uploads(connection, START + HOUR / 2) == []
        assert sorted(expire_uploads(connection, START + 2 * HOUR)) == ["upload_1", "upload_2"]
        assert get_upload(connection, "upload_2", project="other").status is UploadStatus.EXPIRED
        assert get_upload(connection, "upload_3", project="local").status is UploadStatus.PENDING


def test_a_closed_upload_is_listed_until_its_parts_are_deleted(database: Database) -> None:
    add(database)
    with database.write() as connection:
        close_upload(connection, "upload_1", UploadStatus.CANCELLED)
        assert expire_uploads(connection, START) == ["upload_1"]
        delete_parts(connection, "upload_1")
        assert expire_uploads(connection, START) == []
