"""The storage quota of a project, for every request that stores data."""

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
    """A client of a service whose storage quota holds one dataset, but not a second one of the same size."""
    limited = settings.model_copy(update={"max_stored_bytes": 2 * len(ROWS) - 1})
    with TestClient(create_app(limited), URL) as client:
        yield client


def stored_files(settings: Settings) -> int:
    return len([path for path in (settings.resolved_data_dir / "artifacts").rglob("*") if path.is_file()])


STORING_REQUESTS: dict[str, Callable[[TestClient], httpx2.Response]] = {
    "dataset": lambda client: client.post("/datasets", content=OTHER_ROWS),
    "form": lambda client: client.post("/datasets", files={"file": OTHER_ROWS}),
    "inline rows": lambda client: client.post(
        "/jobs", json=spec_of() | {"dataset": {"rows": [json.loads(row) for row in OTHER_ROWS.splitlines()]}}
    ),
    "file": lambda client: client.post("/v1/files", files={"file": OTHER_ROWS}, data={"purpose": "fine-tune"}),
    "upload": lambda client: client.post("/v1/uploads", json=UPLOAD),
}


@pytest.mark.parametrize("name", STORING_REQUESTS)
def test_request_over_the_storage_quota_is_refused_and_stores_nothing(
    client: TestClient, settings: Settings, name: str
) -> None:
    first = client.post("/datasets", content=ROWS)
    assert first.status_code == 201
    before = stored_files(settings)
    refused = STORING_REQUESTS[name](client)
    assert refused.status_code == 429, refused.text
    error = refused.json()["error"]
    assert error["code"] == "quota_exceeded"
    assert f"its limit is {2 * len(ROWS) - 1}: delete datasets" in error["message"]
    # Waiting does not help, so the response does not suggest it.
    assert "Retry-After" not in refused.headers
    assert refused.headers.get("x-should-retry") == ("false" if refused.request.url.path.startswith("/v1/") else None)
    assert stored_files(settings) == before
    assert client.delete(f"/datasets/{first.json()['id']}").status_code == 200
    assert STORING_REQUESTS[name](client).is_success


def test_bytes_that_are_stored_already_do_not_count_again(client: TestClient) -> None:
    first = client.post("/datasets", content=ROWS).json()["id"]
    again = client.post("/datasets", content=ROWS)
    assert (again.status_code, again.json()["id"]) == (201, first)
    assert client.post("/jobs", json=spec_of(first)).status_code == 201


def test_upload_reserves_its_storage_when_it_begins(client: TestClient) -> None:
    upload = client.post("/v1/uploads", json=UPLOAD).json()["id"]
    assert client.post("/datasets", content=OTHER_ROWS).status_code == 429
    part = client.post(f"/v1/uploads/{upload}/parts", files={"data": ROWS}).json()["id"]
    completed = client.post(f"/v1/uploads/{upload}/complete", json={"part_ids": [part]})
    assert completed.status_code == 200, completed.text
    assert client.post("/datasets", content=OTHER_ROWS).status_code == 429


def test_cancelled_upload_releases_its_reserved_storage(client: TestClient) -> None:
    upload = client.post("/v1/uploads", json=UPLOAD).json()["id"]
    assert client.post(f"/v1/uploads/{upload}/cancel").status_code == 200
    assert client.post("/datasets", content=OTHER_ROWS).status_code == 201
