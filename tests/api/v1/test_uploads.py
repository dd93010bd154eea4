from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.v1 import uploads
from tests.api.conftest import MAX_UPLOAD_BYTES, chat_rows

CONTENT = chat_rows(4)


def begin(client: TestClient, **changes: object) -> Any:
    body = {"bytes": len(CONTENT), "filename": "a.jsonl", "mime_type": "text/plain", "purpose": "fine-tune"}
    return client.post("/v1/uploads", json=body | changes)


def send(client: TestClient, upload_id: str, content: bytes) -> Any:
    return client.post(f"/v1/uploads/{upload_id}/parts", files={"data": content})


def test_parts_become_a_file(client: TestClient) -> None:
    upload = begin(client).json()
    assert (upload["status"], upload["bytes"], upload["expires_at"]) == (
        "pending", len(CONTENT), upload["created_at"] + 3600,
    )  # fmt: skip
    parts = [send(client, upload["id"], part).json() for part in (CONTENT[:100], CONTENT[100:])]
    assert {part["upload_id"] for part in parts} == {upload["id"]}
    closed = client.post(f"/v1/uploads/{upload['id']}/complete", json={"part_ids": [part["id"] for part in parts]})
    assert closed.json()["status"] == "completed"
    assert client.get(f"/v1/files/{closed.json()['file']['id']}/content").content == CONTENT


def test_cancelled_upload_takes_no_parts(client: TestClient) -> None:
    upload_id = begin(client).json()["id"]
    assert client.post(f"/v1/uploads/{upload_id}/cancel").json()["status"] == "cancelled"
    assert send(client, upload_id, b"x").status_code == 409


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"purpose": "batch"}, 400, "purpose"),
        ({"bytes": 0}, 400, "bytes"),
        ({"bytes": "9"}, 400, "bytes"),
        ({"bytes": MAX_UPLOAD_BYTES + 1}, 413, "bytes"),
        ({"filename": "/"}, 400, "filename"),
        ({"expires_after": {"anchor": "created_at", "seconds": 3600}}, 400, "expires_after"),
        ({"surprise": 1}, 400, "surprise"),
    ],
)
def test_invalid_upload_is_refused_before_its_parts(
    bare_client: TestClient, changes: dict[str, object], status: int, param: str
) -> None:
    answer = begin(bare_client, **changes)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_part_over_its_limit_is_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_PART_BYTES", 10)
    upload_id = begin(client).json()["id"]
    answer = send(client, upload_id, b"x" * 11)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


def test_unknown_upload_is_not_found(bare_client: TestClient) -> None:
    assert send(bare_client, "upload_none", b"x").status_code == 404
    assert bare_client.post("/v1/uploads/upload_none/cancel").status_code == 404
    complete = bare_client.post("/v1/uploads/upload_none/complete", json={"part_ids": ["part_1"]})
    assert complete.status_code == 404


@pytest.mark.parametrize(
    ("content", "content_type", "status", "code"),
    [
        (b"{}", "text/plain", 415, "unsupported_media_type"),
        (b'{"part_ids": [NaN]}', "application/json", 400, "invalid_json"),
        (b"", "application/json", 400, "invalid_json"),
        (b"null", "application/json", 400, "invalid_request"),
        (b'{"part_ids": []}', "application/json", 400, "invalid_request"),
    ],
)
def test_body_that_is_not_strict_json_is_refused(
    bare_client: TestClient, content: bytes, content_type: str, status: int, code: str
) -> None:
    answer = bare_client.post("/v1/uploads/upload_1/complete", content=content, headers={"Content-Type": content_type})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
