from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from qlora_service.actions.service import Service
from qlora_service.actions.uploads import Uploads
from qlora_service.domain.uploads import UploadStatus
from qlora_service.errors import Conflict, InvalidDataset, InvalidRequest, NotFound, TooLarge
from tests.control_plane import SteppedClock

CONTENT = b"".join(json.dumps({"text": f"row {number}"}).encode() + b"\n" for number in range(6))
HALVES = [CONTENT[:50], CONTENT[50:]]


@pytest.fixture
def stored_parts(tmp_path: Path) -> Callable[[], int]:
    """Counts the parts in the artifact store."""
    return lambda: len([path for path in (tmp_path / "artifacts" / "uploads").rglob("*") if path.is_file()])


def begin(uploads: Uploads, size: int = len(CONTENT)) -> str:
    return uploads.begin(filename="rows.jsonl", size=size, purpose="fine-tune", mime_type="application/jsonl").id


def send(uploads: Uploads, upload_id: str, tmp_path: Path, *contents: bytes) -> list[str]:
    path, ids = tmp_path / "part", []
    for content in contents:
        path.write_bytes(content)
        ids.append(uploads.add_part(upload_id, path).id)
    return ids


def test_parts_become_a_dataset_in_the_given_order(
    service: Service, tmp_path: Path, stored_parts: Callable[[], int]
) -> None:
    uploads = service.uploads
    upload_id = begin(uploads)
    second, first = send(uploads, upload_id, tmp_path, *reversed(HALVES))
    md5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
    completed = uploads.complete(upload_id, [first, second], md5.upper())
    assert completed.dataset is not None
    assert (completed.upload.status, completed.upload.dataset_id) == (UploadStatus.COMPLETED, completed.dataset.id)
    assert b"".join(service.datasets.read(completed.dataset)) == CONTENT
    assert (completed.dataset.filename, completed.dataset.report.usable_rows) == ("rows.jsonl", 6)
    assert stored_parts() == 0


def test_wrong_parts_or_checksum_are_refused_and_the_upload_stays_open(
    service: Service, tmp_path: Path, stored_parts: Callable[[], int]
) -> None:
    uploads = service.uploads
    upload_id = begin(uploads)
    ids = send(uploads, upload_id, tmp_path, *HALVES)
    for part_ids, md5, reason in [
        (ids, "0" * 32, "the parts have the MD5"),
        (ids[:1], None, "have 50 bytes"),
        ([*ids, "part_x"], None, "no part 'part_x'"),
        ([*ids, ids[0]], None, "a part twice"),
    ]:
        with pytest.raises(InvalidRequest, match=reason):
            uploads.complete(upload_id, part_ids, md5)
    assert (service.datasets.list_datasets(), stored_parts()) == ([], 2)
    assert uploads.complete(upload_id, ids).dataset is not None


def test_a_file_without_usable_rows_leaves_the_upload_open(service: Service, tmp_path: Path) -> None:
    content = b'{"x": 1}\n'
    upload_id = begin(service.uploads, len(content))
    ids = send(service.uploads, upload_id, tmp_path, content)
    with pytest.raises(InvalidDataset):
        service.uploads.complete(upload_id, ids)
    assert service.uploads.cancel(upload_id).upload.status is UploadStatus.CANCELLED


def test_more_bytes_than_announced_are_refused_and_not_stored(
    service: Service, tmp_path: Path, stored_parts: Callable[[], int]
) -> None:
    upload_id = begin(service.uploads, 60)
    send(service.uploads, upload_id, tmp_path, HALVES[0])
    with pytest.raises(TooLarge, match="announced with 60 bytes"):
        send(service.uploads, upload_id, tmp_path, HALVES[1])
    assert stored_parts() == 1


def test_a_closed_upload_cannot_be_changed(service: Service, tmp_path: Path, stored_parts: Callable[[], int]) -> None:
    uploads = service.uploads
    upload_id = begin(uploads)
    ids = send(uploads, upload_id, tmp_path, *HALVES)
    assert uploads.cancel(upload_id) == uploads.cancel(upload_id)
    assert stored_parts() == 0
    with pytest.raises(Conflict, match="is cancelled"):
        send(uploads, upload_id, tmp_path, b"x")
    with pytest.raises(Conflict, match="is cancelled"):
        uploads.complete(upload_id, ids)
    completed = begin(uploads)
    uploads.complete(completed, send(uploads, completed, tmp_path, CONTENT))
    with pytest.raises(Conflict, match="is completed"):
        uploads.cancel(completed)


def test_another_projects_upload_is_not_found(service: Service, tmp_path: Path) -> None:
    upload_id = begin(service.uploads)
    other = service.within("other").uploads
    for action in (
        lambda: send(other, upload_id, tmp_path, b"x"),
        lambda: other.complete(upload_id, ["part_1"]),
        lambda: other.cancel(upload_id),
    ):
        with pytest.raises(NotFound):
            action()


def test_parts_of_an_upload_are_deleted_after_an_hour(
    service: Service, clock: SteppedClock, tmp_path: Path, stored_parts: Callable[[], int]
) -> None:
    upload_id = begin(service.uploads)
    send(service.uploads, upload_id, tmp_path, *HALVES)
    clock.advance(timedelta(minutes=59).total_seconds())
    service.uploads.reap()
    assert stored_parts() == 2
    clock.advance(120)
    with pytest.raises(Conflict, match="is expired"):
        send(service.uploads, upload_id, tmp_path, b"x")
    begin(service.within("other").uploads)  # a new upload of any project deletes expired ones
    assert stored_parts() == 0
