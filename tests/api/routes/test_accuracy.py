"""Measurements of finished jobs in plans and forecasts: memory, time, and step times probed on request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from fastapi.testclient import TestClient

from qlora_service.planning.hardware import this_cpu
from qlora_service.planning.time.duration import Kind, Work
from qlora_service.queue.claim import Claim, Progress
from qlora_service.queue.queue import Queue
from qlora_service.specs import JobSpec
from tests.api.conftest import spec_of

PHASES = {"starting": 6.0, "rendering": 0.5, "loading": 3.0, "evaluating": 4.0, "training": 80.0, "publishing": 0.5,
          "certifying": 6.0}  # fmt: skip
ROWS = Work(rows=8, examples=7, steps=1, tokens=200, evaluations=2, held_out_tokens=30, answers=0)


def finish(queue: Queue, **measured: Any) -> None:
    """Ends the next queued job with these measurements."""
    claimed = queue.claim("worker")
    assert claimed is not None
    claim: Claim = claimed[0]
    queue.report(claim, Progress(measured=measured))
    queue.succeed(claim, {"attempt": 1, "steps": 1, "best_step": None})


def plan(client: TestClient, **changes: Any) -> dict[str, Any]:
    response = client.post("/plans", json=spec_of(**changes))
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


def test_accuracy_is_empty_without_finished_jobs(client: TestClient) -> None:
    assert client.get("/plans/accuracy").json() == {"data": []}


def test_accuracy_has_distributions_per_device_and_plans_use_its_margin(
    client: TestClient, queue: Queue, submit: Callable[..., str], dataset_id: str
) -> None:
    cpu = this_cpu().name
    assert plan(client, dataset_id=dataset_id)["memory"]["factor"] == 1.03
    for allocated in (90, 110, 120):
        submit()
        finish(
            queue,
            device=cpu,
            predicted={"memory": {"allocated": 100}, "time": {"seconds": 10}},
            actual={"memory": {"allocated": allocated}, "time": {"seconds": 8}},
        )
    (device,) = client.get("/plans/accuracy").json()["data"]
    assert (device["device"], device["jobs"], device["margin"]) == (cpu, 3, 1.2)
    assert device["allocated"] == {"jobs": 3, "min": 0.9, "p10": 0.9, "p50": 1.1, "p90": 1.2, "max": 1.2}
    assert device["time"]["p50"] == 0.8
    assert (device["reserved"], device["eta"]) == (None, None)
    planned = plan(client, dataset_id=dataset_id)["memory"]
    assert planned["factor"] == 1.2
    assert planned["needed"] >= 1.2 * planned["allocated"]
    forecast = client.get(f"/jobs/{submit()}").json()["forecast"]
    assert forecast["memory"]["factor"] == 1.2


def test_forecast_uses_the_time_of_finished_jobs_of_the_same_kind(
    client: TestClient, queue: Queue, submit: Callable[..., str]
) -> None:
    first = client.get(f"/jobs/{submit()}").json()
    assert first["forecast"]["time"]["seconds"] is None
    assert "has ended" in first["forecast"]["time"]["reason"]
    settings = first["forecast"]["settings"]
    kind = Kind.of(
        JobSpec.model_validate(first["spec"]),
        Work(**ROWS.__dict__ | {"tokens": first["forecast"]["time"]["tokens"]}),
        micro_batch_tokens=settings["micro_batch_tokens"],
        checkpointing=settings["gradient_checkpointing"],
    )
    finish(queue, device=this_cpu().name, kind=asdict(kind), work=asdict(ROWS), phases=PHASES)
    second, third = (client.get(f"/jobs/{submit()}").json() for _ in range(2))
    time = second["forecast"]["time"]
    assert (time["basis"], time["jobs"]) == ("history", 1)
    assert 50 < time["seconds"] < 200
    assert time["seconds"] == pytest.approx(sum(time["phases"].values()), abs=0.1)
    # In OpenAI's API, the job after it is estimated to finish later by the same time.
    ends = [client.get(f"/v1/fine_tuning/jobs/{job['id']}").json()["estimated_finish"] for job in (second, third)]
    assert ends[1] - ends[0] == pytest.approx(time["seconds"], abs=2)
    listed = client.get("/v1/fine_tuning/jobs").json()["data"]
    assert [job["estimated_finish"] is None for job in listed] == [False, False, True]


def test_probe_is_queued_once_when_no_estimate_exists(client: TestClient, dataset_id: str) -> None:
    assert "request a probe" in plan(client, dataset_id=dataset_id)["time"]["reason"]
    for _ in range(2):
        assert "will be timed" in plan(client, dataset_id=dataset_id, probe=True)["time"]["reason"]
    assert "will be timed" in plan(client, dataset_id=dataset_id)["time"]["reason"]


@pytest.mark.parametrize(
    "changes",
    [{"dataset": {}}, {"device": "RTX 3090"}, {"base_model": None, "config": {"hidden_size": 64}}],
)
def test_probe_of_a_job_that_cannot_run_here_is_refused(
    client: TestClient, dataset_id: str, changes: dict[str, Any]
) -> None:
    body = {name: value for name, value in (spec_of(dataset_id) | changes).items() if value is not None}
    response = client.post("/plans", json=body | {"probe": True})
    assert response.status_code == 422
    assert response.json()["error"]["location"] == "/probe"
