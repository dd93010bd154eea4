"""Rows that are left out, or not trained as one would expect, in every answer about them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from qlora_service.domain.row_warnings import RowWarning
from qlora_service.queue.queue import Queue
from qlora_service.settings import Settings
from qlora_service.store.database import Database
from tests.api.conftest import chat_rows, spec_of
from tests.control_plane import add_row_warning

BROKEN = b'{"messages": 1}\n{"messages": [\n'
NOT_TRAINED = RowWarning("`train` is false", "/messages/1/train", 12, [1, 2, 3, 4, 5])
NOT_TRAINED_TEXT = "12 rows (line 1, 2, 3, 4, 5, … at /messages/1/train): `train` is false"


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    database = Database(settings.resolved_database_url)
    yield database
    database.close()


@pytest.fixture
def warned_id(client: TestClient, database: Database, dataset_id: str) -> str:
    """The id of a dataset with a warning."""
    add_row_warning(database, dataset_id, NOT_TRAINED)
    return dataset_id


def events(client: TestClient, path: str) -> list[dict[str, Any]]:
    """The events of a finished stream."""
    lines = client.get(path).text.splitlines()
    types = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    return [{"type": type_, **value} for type_, value in zip(types, data, strict=True)]


def test_upload_reports_every_reason_for_a_row_left_out(client: TestClient) -> None:
    dataset = client.post("/datasets", content=chat_rows(3) + BROKEN * 60).json()
    assert (dataset["finding_count"], len(dataset["findings"]), dataset["warnings"]) == (120, 100, [])
    not_list, syntax = dataset["finding_kinds"]
    assert not_list == {
        "reason": "must be a list, is a number", "pointer": "/messages", "rows": 60, "lines": [4, 6, 8, 10, 12],
    }  # fmt: skip
    assert (syntax["rows"], syntax["lines"]) == (60, [5, 7, 9, 11, 13])
    assert client.get(f"/datasets/{dataset['id']}").json() == dataset


def test_dataset_shows_warnings_from_reading_and_from_rendering(client: TestClient, warned_id: str) -> None:
    dataset = client.get(f"/datasets/{warned_id}?base_model=tiny&max_seq_len_tokens=8").json()
    assert dataset["warnings"] == [NOT_TRAINED.as_dict()]
    (too_long,) = dataset["lengths"]["finding_kinds"]
    assert (too_long["rows"], too_long["lines"]) == (8, [1, 2, 3, 4, 5])
    assert dataset["lengths"]["warnings"] == []


def test_warnings_of_a_job_are_in_every_answer_about_it(client: TestClient, warned_id: str) -> None:
    job = client.post("/jobs", json=spec_of(warned_id)).json()
    assert job["warnings"] == [NOT_TRAINED_TEXT]
    assert client.get(f"/jobs/{job['id']}").json()["warnings"] == job["warnings"]
    assert client.get("/jobs").json()["data"][0]["warnings"] == job["warnings"]
    assert client.get(f"/v1/fine_tuning/jobs/{job['id']}").json()["qlora"]["warnings"] == job["warnings"]


def test_warning_is_an_event_of_its_own_type(client: TestClient, warned_id: str) -> None:
    job_id = client.post("/jobs", json=spec_of(warned_id)).json()["id"]
    (warning,) = events(client, f"/jobs/{job_id}/events?follow=false&types=warning")
    assert (warning["type"], warning["job_id"], warning["message"]) == ("warning", job_id, NOT_TRAINED_TEXT)


def test_rows_left_out_are_warn_events_on_the_wire_of_openai(client: TestClient, queue: Queue) -> None:
    files = {"file": ("train.jsonl", chat_rows(1) + BROKEN)}
    file = client.post("/v1/files", data={"purpose": "fine-tune"}, files=files).json()
    qlora = {"training": {"max_seq_len_tokens": 128}}
    body = {"model": "tiny", "training_file": file["id"], "qlora": qlora}
    job = client.post("/v1/fine_tuning/jobs", json=body).json()
    claimed = queue.claim("worker")
    assert claimed is not None
    queue.warn(claimed[0], [*job["qlora"]["warnings"], "found by the trainer"])
    data = client.get(f"/v1/fine_tuning/jobs/{job['id']}/events").json()["data"]
    levels = [(event["level"], event["message"].partition(": ")[0], event["type"]) for event in reversed(data)]
    assert levels == [
        ("info", "The job is queued", "message"),
        ("warn", "left out", "message"),
        ("warn", "left out", "message"),
        ("info", "The job has started", "message"),
        ("warn", "found by the trainer", "message"),
    ]
    warnings = [event["message"] for event in reversed(data) if event["level"] == "warn"]
    assert warnings[0] == "left out: 1 row (line 2 at /messages): must be a list, is a number"
    assert warnings[1].startswith("left out: 1 row (line 3): not valid JSON: ")
    assert client.get(f"/jobs/{job['id']}").json()["warnings"] == warnings
