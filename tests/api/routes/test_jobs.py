from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from api.main import create_app
from qlora_service.domain.jobs import StopRequest
from qlora_service.queue.claim import Progress
from qlora_service.queue.queue import Queue
from qlora_service.settings import Settings
from qlora_service.store.database import Database
from qlora_service.store.tables import jobs
from tests.api.conftest import URL, chat_rows, spec_of

ROWS = [json.loads(line) for line in chat_rows(4).splitlines()]
JSON = {"Content-Type": "application/json"}


def form(spec: object, rows: bytes | None) -> dict[str, tuple[str | None, bytes]]:
    """The parts of a form with a config and, unless None, a dataset."""
    config = spec if isinstance(spec, bytes) else json.dumps(spec).encode()
    parts: dict[str, tuple[str | None, bytes]] = {"config": (None, config)}
    return parts if rows is None else parts | {"dataset": ("rows.jsonl", rows)}


def test_job_on_a_stored_dataset_is_queued(client: TestClient, dataset_id: str) -> None:
    response = client.post("/jobs", json=spec_of(dataset_id, name="first", metadata={"team": "a"}))
    assert response.status_code == 201
    job = response.json()
    assert response.headers["Location"] == f"/jobs/{job['id']}"
    assert job["warnings"] == []
    assert (job["object"], job["status"], job["queue_position"]) == ("job", "queued", 0)
    assert (job["name"], job["base_model"], job["dataset_id"]) == ("first", "tiny", dataset_id)
    assert job["metadata"] == {"team": "a"}
    assert job["spec"]["training"]["max_seq_len_tokens"] == 128
    assert job["spec"]["training"]["prompt_format"] == "chat"
    assert job["progress"] == {"step": 0, "total_steps": None, "fraction": None, "eta_s": None}
    assert client.get(f"/jobs/{job['id']}").json() == job


def test_inline_rows_are_stored_as_a_dataset(client: TestClient) -> None:
    job = client.post("/jobs", json=spec_of(dataset={"rows": ROWS})).json()
    dataset = client.get(f"/datasets/{job['dataset_id']}").json()
    assert dataset["rows"] == 4
    assert job["spec"]["dataset"] == {"id": dataset["id"], "rows": None, "container": None, "shape": None}


def test_form_with_dataset_and_config_is_queued(client: TestClient) -> None:
    rows = chat_rows(4) + b'{"messages": []}\n'
    response = client.post("/jobs", files=form(spec_of(dataset={"shape": "messages"}), rows))
    assert response.status_code == 201
    job = response.json()
    dataset = client.get(f"/datasets/{job['dataset_id']}").json()
    assert (dataset["filename"], dataset["usable_rows"]) == ("rows.jsonl", 4)
    (warning,) = job["warnings"]
    assert warning.startswith("left out: 1 row (line 5 at /messages): ")
    assert client.get(f"/jobs/{job['id']}").json() == client.get("/jobs").json()["data"][0] == job


def test_config_part_may_be_a_file_and_name_a_stored_dataset(client: TestClient, dataset_id: str) -> None:
    config = ("job.json", json.dumps(spec_of(dataset_id)).encode())
    assert client.post("/jobs", files={"config": config}).status_code == 201


@pytest.mark.parametrize(
    ("spec", "status", "code", "location"),
    [
        (spec_of(), 422, "invalid_spec", "/dataset"),
        (spec_of("ds_none"), 404, "not_found", "/dataset/id"),
        (spec_of(dataset={"rows": ROWS}, base_model="tinny"), 422, "invalid_model", "/base_model"),
        (spec_of(dataset={"rows": ROWS}, base_model="../tiny"), 422, "invalid_model", "/base_model"),
        ({"dataset": {"rows": ROWS}}, 422, "invalid_spec", "/base_model"),
        (spec_of(dataset={"rows": ROWS}, adapter={"r": 0}), 422, "invalid_spec", "/adapter/r"),
        (spec_of(dataset={"rows": ROWS}, trainer={}), 422, "invalid_spec", "/trainer"),
        (
            spec_of(dataset={"rows": ROWS}, training={"max_seq_len_tokens": 10**6}),
            422,
            "invalid_spec",
            "/training/max_seq_len_tokens",
        ),
        (spec_of(dataset={"rows": ROWS, "id": "ds_1"}), 422, "invalid_spec", "/dataset"),
        (spec_of(dataset={"rows": []}), 422, "invalid_dataset", "/dataset"),
        (spec_of(dataset={"rows": [{"a": 1}]}), 422, "invalid_dataset", "/dataset"),
        (spec_of(dataset={"rows": ROWS}, training={"max_seq_len_tokens": 8}), 422, "invalid_dataset", "/dataset"),
        ([], 422, "invalid_spec", "/"),
    ],
)
def test_job_that_cannot_run_is_refused_and_nothing_is_stored(
    bare_client: TestClient,
    nothing_stored: Callable[[], None],
    spec: Any,
    status: int,
    code: str,
    location: str,
) -> None:
    response = bare_client.post("/jobs", json=spec)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["location"]) == (code, location)
    assert error["message"]
    nothing_stored()


def test_misspelled_field_is_answered_with_the_nearest_name(bare_client: TestClient) -> None:
    error = bare_client.post("/jobs", json=spec_of(training={"learning_rat": 1e-4})).json()["error"]
    assert error["findings"] == [
        {"reason": "unknown field 'learning_rat': did you mean 'learning_rate'?", "pointer": "/training/learning_rat"}
    ]


def test_all_errors_are_listed_at_once(bare_client: TestClient) -> None:
    error = bare_client.post("/jobs", json={"adapter": {"r": 0}, "training": {"epochs": -1}}).json()["error"]
    assert {finding["pointer"] for finding in error["findings"]} == {"/base_model", "/adapter/r", "/training/epochs"}


def test_findings_in_inline_rows_point_into_the_body(bare_client: TestClient) -> None:
    invalid = [{"messages": []}, {"messages": [{"role": "user", "content": 1}]}]
    error = bare_client.post("/jobs", json=spec_of(dataset={"rows": invalid, "shape": "messages"})).json()["error"]
    first, second = error["findings"]
    assert first["pointer"] == "/dataset/rows/0/messages"
    assert second["pointer"].startswith("/dataset/rows/1/messages/0")
    assert "line" not in first


def test_findings_in_inline_rows_over_the_limit_point_into_the_body(bare_client: TestClient) -> None:
    long = json.loads(chat_rows(1, answer="very long " * 200))
    error = bare_client.post("/jobs", json=spec_of(dataset={"rows": [*ROWS, long]})).json()["error"]
    assert [finding["pointer"] for finding in error["findings"]] == ["/dataset/rows/4"]


def test_findings_in_rows_over_the_limit_have_line_numbers(
    bare_client: TestClient, nothing_stored: Callable[[], None]
) -> None:
    rows = chat_rows(3) + chat_rows(1, answer="very long " * 200)
    error = bare_client.post("/jobs", files=form(spec_of(), rows)).json()["error"]
    assert "1 of 4 rows" in error["message"]
    assert [finding["line"] for finding in error["findings"]] == [4]
    nothing_stored()


@pytest.mark.parametrize(
    ("rows", "spec", "status", "location"),
    [
        (b"", spec_of(), 422, "/dataset"),
        (b"\x1f\x8b\x08" + bytes(40), spec_of(), 422, "/dataset"),
        (b'{"messages": []}\n' * 3, spec_of(), 422, "/dataset"),
        (chat_rows(2, answer="x " * 300), spec_of(), 422, "/dataset"),
        (chat_rows(2), spec_of("ds_1"), 422, "/dataset"),
        (chat_rows(2), spec_of(dataset={"container": "parquet"}), 422, "/dataset"),
        (chat_rows(2), b'{"base_model": "tiny"', 400, "config"),
        (chat_rows(2), b'{"base_model": "\xff"}', 400, "config"),
        (chat_rows(2), b'{"base_model": NaN}', 400, "config"),
        (chat_rows(2), b'{"base_model": "\\ud800"}', 400, "/base_model"),
        (None, spec_of(), 422, "/dataset"),
    ],
)
def test_form_of_a_job_that_cannot_run_is_refused_and_nothing_is_stored(
    bare_client: TestClient,
    nothing_stored: Callable[[], None],
    rows: bytes | None,
    spec: object,
    status: int,
    location: str | None,
) -> None:
    response = bare_client.post("/jobs", files=form(spec, rows))
    assert response.status_code == status, response.text
    assert response.json()["error"]["location"] == location
    nothing_stored()


def test_form_without_config_is_refused(bare_client: TestClient, nothing_stored: Callable[[], None]) -> None:
    response = bare_client.post("/jobs", files={"dataset": ("rows.jsonl", chat_rows(2))})
    assert response.status_code == 422
    assert response.json()["error"]["location"] == "config"
    nothing_stored()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"base_model": NaN}',
        b'{"base_model": "tiny", "base_model": "tiny"}',
        b'{"base_model": "\\ud800"}',
        b'{"\\ud800": 1, "\\ud800": 2}',
        b'{"base_model": "a\\u0000"}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_body_that_is_not_strict_json_is_answered_400(bare_client: TestClient, body: bytes) -> None:
    response = bare_client.post("/jobs", content=body, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


def test_body_of_another_media_type_is_refused(bare_client: TestClient) -> None:
    response = bare_client.post("/jobs", content=b"{}", headers={"Content-Type": "text/plain"})
    assert response.status_code == 415
    assert "application/json" in response.json()["error"]["message"]


def test_jobs_are_filtered_and_listed_newest_first_in_pages(client: TestClient, submit: Callable[..., str]) -> None:
    ids = [submit() for _ in range(3)]
    client.post(f"/jobs/{ids[0]}/cancel")
    first = client.get("/jobs?limit=2").json()
    assert [job["id"] for job in first["data"]] == [ids[2], ids[1]]
    second = client.get("/jobs", params={"limit": 2, "after": first["next"]}).json()
    assert [job["id"] for job in second["data"]] == [ids[0]]
    assert second["next"] is None
    assert [job["id"] for job in client.get("/jobs?status=cancelled").json()["data"]] == [ids[0]]
    assert client.get("/jobs?base_model=other").json() == {"data": [], "next": None}
    assert [job["queue_position"] for job in first["data"]] == [1, 0]


def test_running_job_shows_progress_and_all_metrics(
    client: TestClient, submit: Callable[..., str], queue: Queue
) -> None:
    job_id = submit()
    claimed = queue.claim("worker")
    assert claimed is not None
    claim = claimed[0]
    for step in (1, 2):
        record = {"attempt": claim.token, "step": step, "loss": 2.0 / step}
        progress = Progress(phase="training", step=step, total_steps=8, eta_s=60.0, metrics=record)
        queue.report(claim, progress, ("metrics", record))
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["phase"], job["attempt"], job["queue_position"]) == ("running", "training", 1, None)
    assert job["progress"] == {"step": 2, "total_steps": 8, "fraction": 0.25, "eta_s": 60.0}
    assert job["metrics"]["loss"] == 1.0
    metrics = client.get(f"/jobs/{job_id}/metrics").json()["data"]
    assert [record["step"] for record in metrics] == [1, 2]


def test_pages_of_metrics_contain_whole_steps(client: TestClient, submit: Callable[..., str], queue: Queue) -> None:
    job_id = submit()
    claimed = queue.claim("worker")
    assert claimed is not None
    for step in range(5):
        queue.report(claimed[0], Progress(), ("evaluation", {"step": step, "eval_loss": 1.0}))
        queue.report(claimed[0], Progress(), ("metrics", {"step": step, "loss": 1.0}))
    everything = client.get(f"/jobs/{job_id}/metrics").json()
    assert (len(everything["data"]), everything["next"]) == (10, None)
    pages, after = [], None
    while True:
        params = {"limit": 2} if after is None else {"limit": 2, "after": after}
        page = client.get(f"/jobs/{job_id}/metrics", params=params).json()
        pages.append(page["data"])
        if (after := page["next"]) is None:
            break
    assert [len(page) for page in pages] == [4, 4, 2]
    assert [record for page in pages for record in page] == everything["data"]
    assert client.get(f"/jobs/{job_id}/metrics?after=4").json() == {"data": [], "next": None}
    assert client.get(f"/jobs/{job_id}/metrics?limit=5").json()["next"] is None
    for invalid in ("limit=0", "after=-1", "after=x", "after=99999999999999999999"):
        assert client.get(f"/jobs/{job_id}/metrics?{invalid}").status_code == 422


def test_failed_job_shows_its_error(client: TestClient, submit: Callable[..., str], queue: Queue) -> None:
    job_id = submit()
    claimed = queue.claim("worker")
    assert claimed is not None
    queue.fail(claimed[0], {"code": "job_failed", "message": "killed by SIGKILL at step 7"})
    assert client.get(f"/jobs/{job_id}").json()["error"]["message"] == "killed by SIGKILL at step 7"


def test_cancel_ends_a_queued_job_and_requests_the_stop_of_a_running_one(
    client: TestClient, submit: Callable[..., str], queue: Queue
) -> None:
    queued, running = submit(priority=-1), submit()
    assert queue.claim("worker") is not None
    assert client.post(f"/jobs/{queued}/cancel").json()["status"] == "cancelled"
    assert client.post(f"/jobs/{queued}/cancel").json()["status"] == "cancelled"
    requested = client.post(f"/jobs/{running}/cancel").json()
    assert (requested["status"], requested["stop_request"]) == ("running", "cancel")


def test_queued_job_is_paused_and_resumed(client: TestClient, submit: Callable[..., str], queue: Queue) -> None:
    job_id = submit()
    for _ in range(2):
        paused = client.post(f"/jobs/{job_id}/pause").json()
        assert (paused["status"], paused["stop_request"], paused["queue_position"]) == ("paused", None, None)
        assert paused["hold"] == {"reason": "user", "message": "paused until it is resumed", "needs_bytes": None}
    assert [job["id"] for job in client.get("/jobs?status=paused").json()["data"]] == [job_id]
    assert queue.claim("worker") is None
    first = submit()
    for _ in range(2):
        resumed = client.post(f"/jobs/{job_id}/resume").json()
        assert (resumed["status"], resumed["hold"], resumed["queue_position"]) == ("queued", None, 0)
    assert client.get(f"/jobs/{first}").json()["queue_position"] == 1


def test_running_job_is_paused_after_its_next_step_which_is_saved(
    client: TestClient, submit: Callable[..., str], queue: Queue
) -> None:
    job_id = submit()
    claimed = queue.claim("worker")
    assert claimed is not None
    requested = client.post(f"/jobs/{job_id}/pause").json()
    assert (requested["status"], requested["stop_request"], requested["hold"]) == ("running", "pause", None)
    withdrawn = client.post(f"/jobs/{job_id}/resume").json()
    assert (withdrawn["status"], withdrawn["stop_request"], withdrawn["queue_position"]) == ("running", None, None)
    client.post(f"/jobs/{job_id}/pause")
    assert queue.report(claimed[0], Progress(step=3, checkpoint_step=3)) is StopRequest.PAUSE
    queue.release(claimed[0], "paused by the user")
    paused = client.get(f"/jobs/{job_id}").json()
    assert (paused["status"], paused["checkpoint_step"], paused["stop_request"]) == ("paused", 3, None)


def test_job_paused_by_a_full_disk_shows_the_space_it_needs(
    client: TestClient, submit: Callable[..., str], queue: Queue
) -> None:
    job_id = submit()
    claimed = queue.claim("worker")
    assert claimed is not None
    hold = {"reason": "disk_full", "message": "the checkpoint needs 5 GiB: free some", "needs_bytes": 5 * 2**30}
    queue.pause(claimed[0], hold)
    assert client.get(f"/jobs/{job_id}").json()["hold"] == hold


def test_job_of_another_version_is_shown_as_unreadable_and_can_be_cancelled(
    client: TestClient, submit: Callable[..., str], finished_job: str, settings: Settings
) -> None:
    job_id = submit(name="odd")
    database = Database(settings.resolved_database_url)
    with database.write() as connection:
        connection.execute(sa.update(jobs).values(spec={"name": "odd", "adapter": {"method": "of later"}}))
    database.close()
    listed = client.get("/jobs").json()["data"]
    assert [(job["id"], job["spec"], job["name"]) for job in listed] == [
        (job_id, None, "odd"),
        (finished_job, None, "odd"),
    ]
    assert job_id in listed[0]["unreadable"]
    assert client.get(f"/jobs/{job_id}").json() == listed[0]
    for path in ("metrics", "metrics.csv", "events?follow=false", "artifacts"):
        assert client.get(f"/jobs/{finished_job}/{path}").status_code == 200
    (openai_job, _) = client.get("/v1/fine_tuning/jobs").json()["data"]
    assert (openai_job["id"], openai_job["seed"], openai_job["hyperparameters"]["batch_size"]) == (job_id, None, None)
    for path in ("", "/events", "/checkpoints"):
        assert client.get(f"/v1/fine_tuning/jobs/{finished_job}{path}").status_code == 200
    completion_request = {"model": finished_job, "messages": [{"role": "user", "content": "?"}]}
    chat = client.post("/v1/chat/completions", json=completion_request)
    assert (chat.status_code, chat.json()["error"]["code"]) == (404, "model_not_found")
    assert "another version" not in chat.text
    assert "post it again" in chat.text
    assert client.post(f"/jobs/{job_id}/cancel").json()["status"] == "cancelled"


def test_submission_to_a_full_queue_is_refused(settings: Settings) -> None:
    limited = settings.model_copy(update={"max_queued_jobs": 2})
    with TestClient(create_app(limited), URL) as client:
        spec, key = spec_of(dataset={"rows": ROWS}), {"Idempotency-Key": "third"}
        first, _ = (client.post("/jobs", json=spec).json() for _ in range(2))
        refused = client.post("/jobs", json=spec, headers=key)
        assert refused.status_code == 429
        assert refused.headers["Retry-After"] == "5"
        assert refused.json()["error"]["code"] == "quota_exceeded"
        assert refused.json()["error"]["details"] == {"max_queued_jobs": 2}
        assert len(client.get("/jobs").json()["data"]) == 2
        client.post(f"/jobs/{first['id']}/pause")
        assert client.post("/jobs", json=spec, headers=key).status_code == 201
        # A paused job cannot be resumed into a full queue either.
        assert client.post(f"/jobs/{first['id']}/resume").status_code == 429
        assert client.get(f"/jobs/{first['id']}").json()["status"] == "paused"


@pytest.mark.parametrize("action", ["cancel", "pause", "resume"])
def test_ended_job_cannot_be_changed(client: TestClient, finished_job: str, action: str) -> None:
    response = client.post(f"/jobs/{finished_job}/{action}")
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "conflict"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""), ("POST", "/cancel"), ("POST", "/pause"), ("POST", "/resume"), ("GET", "/metrics"),
        ("GET", "/events"), ("GET", "/artifacts"), ("GET", "/artifacts/manifest.json"), ("GET", "/adapter.zip"),
    ],
)  # fmt: skip
def test_unknown_job_is_not_found(bare_client: TestClient, method: str, path: str) -> None:
    response = bare_client.request(method, f"/jobs/job_none{path}")
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["location"]) == ("not_found", "job_id")
