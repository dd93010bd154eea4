from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from qlora_service.queue.queue import Queue
from qlora_service.settings import Settings
from tests.api.conftest import chat_rows, scratch_files, spec_of

ROWS = [json.loads(line) for line in chat_rows(4).splitlines()]
KEY = {"Idempotency-Key": "7f3c"}
REPLAYED = "Idempotent-Replayed"


def inline(**changes: Any) -> dict[str, Any]:
    return spec_of(dataset={"rows": ROWS}, **changes)


def count(client: TestClient, collection: str = "jobs") -> int:
    return len(client.get(f"/{collection}?limit=100").json()["data"])


def test_same_request_with_the_same_key_creates_one_job_and_gets_the_same_response(client: TestClient) -> None:
    first = client.post("/jobs", json=inline(), headers=KEY)
    assert first.status_code == 201
    assert REPLAYED not in first.headers
    other = client.post("/jobs", json=inline(priority=9))  # changes the queue position of the first job
    again = client.post("/jobs", json=inline(), headers=KEY)
    assert (again.status_code, again.headers[REPLAYED]) == (201, "true")
    assert again.json() == first.json()
    assert again.headers["Location"] == first.headers["Location"]
    assert {job["id"] for job in client.get("/jobs").json()["data"]} == {first.json()["id"], other.json()["id"]}


def test_requests_without_a_key_create_separate_jobs(client: TestClient) -> None:
    assert len({client.post("/jobs", json=inline()).json()["id"] for _ in range(2)}) == 2


def test_replayed_response_does_not_change_when_the_job_starts(client: TestClient, queue: Queue) -> None:
    first = client.post("/jobs", json=inline(), headers=KEY).json()
    assert queue.claim("worker") is not None
    assert client.get(f"/jobs/{first['id']}").json()["status"] == "running"
    assert client.post("/jobs", json=inline(), headers=KEY).json() == first


def test_json_bodies_are_compared_by_value(client: TestClient) -> None:
    headers = KEY | {"Content-Type": "application/json"}
    first = client.post("/jobs", content=json.dumps(inline()), headers=headers)
    reordered = dict(reversed(inline().items()))
    again = client.post("/jobs", content=json.dumps(reordered, indent=2).encode(), headers=headers)
    assert again.json() == first.json()
    assert count(client) == 1


def test_form_of_a_job_is_compared_by_its_parts(client: TestClient) -> None:
    def post(rows: bytes, name: str = "a.jsonl", **changes: Any) -> Any:
        parts = {"config": (None, json.dumps(spec_of(**changes))), "dataset": (name, rows)}
        return client.post("/jobs", files=parts, headers=KEY)  # every call has another boundary

    first = post(chat_rows(4))
    again = post(chat_rows(4))
    assert (again.json(), again.headers[REPLAYED]) == (first.json(), "true")
    assert post(chat_rows(5)).status_code == 409
    assert post(chat_rows(4), name="b.jsonl").status_code == 409
    assert post(chat_rows(4), priority=1).status_code == 409
    assert count(client) == 1


def test_raw_upload_is_compared_by_bytes_and_query(client: TestClient, settings: Settings) -> None:
    def post(rows: bytes, query: str = "?filename=a.jsonl&shape=messages") -> Any:
        return client.post(f"/datasets{query}", content=rows, headers=KEY)

    first = post(chat_rows(4))
    assert first.status_code == 201
    again = post(chat_rows(4), "?shape=messages&filename=a.jsonl")
    assert (again.status_code, again.json(), again.headers[REPLAYED]) == (201, first.json(), "true")
    assert post(chat_rows(5)).status_code == 409
    assert post(chat_rows(4), "?filename=b.jsonl").status_code == 409
    assert count(client, "datasets") == 1
    assert scratch_files(settings) == []


def test_form_of_a_dataset_is_compared_by_its_parts(client: TestClient) -> None:
    def post(rows: bytes, shape: str = "messages") -> Any:
        return client.post("/datasets", files={"file": ("a.jsonl", rows)}, data={"shape": shape}, headers=KEY)

    first = post(chat_rows(4))
    assert post(chat_rows(4)).json() == first.json()
    assert post(chat_rows(4), shape="text").status_code == 409
    assert post(chat_rows(3)).status_code == 409


def test_key_used_with_another_body_or_path_is_a_conflict(client: TestClient, submit: Callable[..., str]) -> None:
    job_id = submit()
    assert client.post(f"/jobs/{job_id}/pause", headers=KEY).status_code == 200
    for path, body in [(f"/jobs/{job_id}/cancel", None), ("/jobs", inline()), (f"/jobs/{submit()}/pause", None)]:
        response = client.post(path, json=body, headers=KEY)
        assert response.status_code == 409
        error = response.json()["error"]
        assert (error["code"], error["location"]) == ("conflict", "idempotency-key")
        assert "send a new key with every new request" in error["message"]
    assert count(client) == 2


def test_late_retry_does_not_change_the_state_again(client: TestClient, submit: Callable[..., str]) -> None:
    job_id = submit()
    paused = client.post(f"/jobs/{job_id}/pause", headers=KEY).json()
    resumed = client.post(f"/jobs/{job_id}/resume", headers={"Idempotency-Key": "other"}).json()
    assert (paused["status"], resumed["status"], resumed["queue_position"]) == ("paused", "queued", 0)
    late_retry = client.post(f"/jobs/{job_id}/pause", headers=KEY)
    assert (late_retry.json(), late_retry.headers[REPLAYED]) == (paused, "true")
    assert client.get(f"/jobs/{job_id}").json()["status"] == "queued"


def test_error_responses_are_not_stored(client: TestClient, submit: Callable[..., str]) -> None:
    for _ in range(2):
        refused = client.post("/jobs", json=inline(priority="high"), headers=KEY)
        assert (refused.status_code, REPLAYED in refused.headers) == (422, False)
    assert client.post("/jobs", json=inline(), headers=KEY).status_code == 201
    job_id, key = submit(), {"Idempotency-Key": "state"}
    client.post(f"/jobs/{job_id}/cancel")
    for _ in range(2):
        assert client.post(f"/jobs/{job_id}/pause", headers=key).status_code == 409


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb", "schlüssel".encode(), b"\x7f"])
@pytest.mark.parametrize("path", ["/jobs", "/datasets", "/jobs/job_none/cancel"])
def test_invalid_key_is_refused_and_nothing_is_stored(
    bare_client: TestClient, nothing_stored: Callable[[], None], path: str, key: str | bytes
) -> None:
    value = key if isinstance(key, bytes) else key.encode()
    response = bare_client.post(path, content=chat_rows(2), headers=[(b"Idempotency-Key", value)])
    assert response.status_code == 422
    error = response.json()["error"]
    assert error["location"] == "idempotency-key"
    assert "send it once, with 1 to 255 printable ASCII characters" in error["message"]
    nothing_stored()


def test_two_keys_are_refused(bare_client: TestClient) -> None:
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    assert bare_client.post("/jobs/job_none/cancel", headers=headers).status_code == 422


@pytest.mark.parametrize("key", ["x" * 255, "~ !", "550e8400-e29b-41d4-a716-446655440000"])
def test_any_printable_ascii_key_is_accepted(client: TestClient, key: str) -> None:
    responses = [client.post("/jobs", json=inline(), headers={"Idempotency-Key": key}) for _ in range(2)]
    assert [response.status_code for response in responses] == [201, 201]
    assert count(client) == 1
