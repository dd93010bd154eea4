from __future__ import annotations

from collections.abc import Callable

from fastapi.testclient import TestClient

from qlora_service.queue.queue import Queue


def test_base_models_and_fine_tuned_ones_are_listed(client: TestClient, finished_job: str) -> None:
    job = client.get(f"/v1/fine_tuning/jobs/{finished_job}").json()
    base, tuned = client.get("/v1/models").json()["data"]
    assert (base["id"], base["owned_by"], base["object"]) == ("tiny", "base", "model")
    assert (tuned["id"], tuned["owned_by"]) == (job["fine_tuned_model"], "local")
    for model in (base, tuned):
        assert client.get(f"/v1/models/{model['id']}").json() == model


def test_deleted_model_is_gone_with_its_files(client: TestClient, finished_job: str) -> None:
    name = client.get(f"/v1/fine_tuning/jobs/{finished_job}").json()["fine_tuned_model"]
    assert client.get(f"/v1/fine_tuning/jobs/{finished_job}/checkpoints").json()["data"]
    assert client.delete(f"/v1/models/{name}").json() == {"id": name, "object": "model", "deleted": True}
    for answer in (client.get(f"/v1/models/{name}"), client.delete(f"/v1/models/{name}")):
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")
    gone = client.get(f"/jobs/{finished_job}/artifacts")
    assert gone.status_code == 409
    assert "was deleted at" in gone.json()["error"]["message"]
    job = client.get(f"/v1/fine_tuning/jobs/{finished_job}").json()
    assert (job["status"], job["fine_tuned_model"]) == ("succeeded", name)
    assert client.get(f"/v1/fine_tuning/jobs/{finished_job}/checkpoints").json()["data"] == []


def test_base_model_cannot_be_deleted(client: TestClient) -> None:
    answer = client.delete("/v1/models/tiny")
    assert answer.status_code == 409
    assert "qlora models remove tiny" in answer.json()["error"]["message"]


def test_unfinished_job_has_no_model(client: TestClient, submit: Callable[..., str], queue: Queue) -> None:
    name = f"ft:tiny:local::{submit().removeprefix('job_')}"
    assert client.get(f"/v1/models/{name}").status_code == 404
    assert client.get("/v1/models/org%2Fname").status_code == 404
