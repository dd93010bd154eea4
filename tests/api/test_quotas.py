"""What a project may keep, on every way that something comes to be kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import httpx2
import pytest
from fastapi.testclient import TestClient

from api.main import create_app
from qlora_service.settings import Settings
from tests.api.conftest import URL, chat_rows, spec_of

ROWS = chat_rows(8)
OTHER_ROWS = chat_rows(8, answer="Lyon!")
UPLOAD = {"bytes": len(ROWS), "filename": "rows.jsonl", "mime_type": "application/jsonl", "purpose": "fine-tune"}


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    """One dataset has room, and a second one of its size has not."""
    limited = settings.model_copy(update={"max_stored_bytes": 2 * len(ROWS) - 1})
    with TestClient(create_app(limited), URL) as client:
        yield client


def stored_files(settings: Settings) -> int:
    return len([path for path in (settings.resolved_data_dir / "artifacts").rglob("*") if path.is_file()])


WAYS: dict[str, Callable[[TestClient], httpx2.Response]] = {
    "dataset": lambda client: client.post("/datasets", content=OTHER_ROWS),
    "form": lambda client: client.post("/datasets", files={"file": OTHER_ROWS}),
    "inline rows": lambda client: client.post(
        "/jobs", json=spec_of() | {"dataset": {"rows": [json.loads(row) for row in OTHER_ROWS.splitlines()]}}
    ),
    "file": lambda client: client.post("/v1/files", files={"file": OTHER_ROWS}, data={"purpose": "fine-tune"}),
    "upload": lambda client: client.post("/v1/uploads", json=UPLOAD),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_has_no_room_is_refused_before_it_is_stored(client: TestClient, settings: Settings, way: str) -> None:
    first = client.post("/datasets", content=ROWS)
    assert first.status_code == 201
    before = stored_files(settings)
    refused = WAYS[way](client)
    assert refused.status_code == 429, refused.text
    error = refused.json()["error"]
    assert error["code"] == "quota_exceeded"
    assert f"its limit is {2 * len(ROWS) - 1}: delete datasets" in error["message"]
    # Waiting does not help.
    assert "Retry-After" not in refused.headers
    assert refused.headers.get("x-should-retry") == ("false" if refused.request.url.path.startswith("/v1/") else None)
    assert stored_files(settings) == before
    assert client.delete(f"/datasets/{first.json()['id']}").status_code == 200
    assert WAYS[way](client).is_success


def test_what_is_stored_already_takes_no_room(client: TestClient) -> None:
    first = client.post("/datasets", content=ROWS).json()["id"]
    again = client.post("/datasets", content=ROWS)
    assert (again.status_code, again.json()["id"]) == (201, first)
    assert client.post("/jobs", json=spec_of(first)).status_code == 201


def test_upload_that_has_begun_has_its_room(client: TestClient) -> None:
    upload = client.post("/v1/uploads", json=UPLOAD).json()["id"]
    assert client.post("/datasets", content=OTHER_ROWS).status_code == 429
    part = client.post(f"/v1/uploads/{upload}/parts", files={"data": ROWS}).json()["id"]
    completed = client.post(f"/v1/uploads/{upload}/complete", json={"part_ids": [part]})
    assert completed.status_code == 200, completed.text
    assert client.post("/datasets", content=OTHER_ROWS).status_code == 429


def test_cancelled_upload_gives_its_room_back(client: TestClient) -> None:
    upload = client.post("/v1/uploads", json=UPLOAD).json()["id"]
    assert client.post(f"/v1/uploads/{upload}/cancel").status_code == 200
    assert client.post("/datasets", content=OTHER_ROWS).status_code == 201
