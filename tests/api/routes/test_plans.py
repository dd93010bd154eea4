from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.main import create_app
from qlora_service.settings import Settings
from tests.api.conftest import URL, chat_rows, settings_in, spec_of
from tests.planning_models import MODELS

SEVENTY = MODELS["Llama-2-70B"]


def test_a_model_of_the_catalog_is_planned_for_this_machine(client: TestClient) -> None:
    answer = client.post("/plans", json={"base_model": "tiny"})
    assert answer.status_code == 200
    plan = answer.json()
    assert (plan["object"], plan["verdict"], plan["source"]) == ("plan", "fits", "formula")
    assert plan["device"]["found_by"] in {"cpu", "nvml"}
    assert sum(plan["memory"]["categories"].values()) == plan["memory"]["allocated"]


def test_seventy_billion_parameters_need_neither_weights_nor_a_gpu(client: TestClient) -> None:
    asked = {"config": SEVENTY, "device": "RTX 3090", "training": {"max_seq_len_tokens": 512, "batch_size": 1}}
    plan = client.post("/plans", json=asked).json()
    assert plan["verdict"] == "does_not_fit"
    assert "packed weights alone" in plan["reason"]
    assert plan["largest"]["model"]
    assert client.post("/plans", json=asked | {"device": "48GB"}).json()["verdict"] == "fits"


def test_a_whole_spec_can_be_planned_as_it_is(client: TestClient, dataset_id: str) -> None:
    spec = spec_of(dataset_id, name="mine", recipe="fast", validation={"fraction": 0.2}, priority=3)
    plan = client.post("/plans", json=spec).json()
    assert plan["longest_tokens"] < 128


@pytest.mark.parametrize(
    ("body", "status", "code", "location"),
    [
        (b"{", 400, "invalid_json", None),
        ([], 422, "invalid_spec", "/"),
        ({}, 422, "invalid_spec", "/base_model"),
        ({"base_model": "absent"}, 422, "invalid_model", "/base_model"),
        ({"base_model": "tiny", "config": {}}, 422, "invalid_spec", "/config"),
        ({"config": {}}, 422, "invalid_model", "/config"),
        ({"config": SEVENTY | {"vocab_size": "a"}}, 422, "invalid_model", "/config"),
        ({"config": []}, 422, "invalid_spec", "/config"),
        ({"base_model": "tiny", "device": "RTX 3091"}, 422, "invalid_request", "/device"),
        ({"base_model": "tiny", "free_bytes": -1}, 422, "invalid_spec", "/free_bytes"),
        ({"base_model": "tiny", "adapter": {"rank": 8}}, 422, "invalid_spec", "/adapter/rank"),
        ({"base_model": "tiny", "dataset": {"id": "ds_none"}}, 404, "not_found", "/dataset/id"),
        ({"base_model": "tiny", "dataset": {"rows": [{"text": "a"}]}}, 422, "invalid_spec", "/dataset/rows"),
    ],
)
def test_refusal_names_its_place(client: TestClient, body: Any, status: int, code: str, location: str | None) -> None:
    sent = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = client.post("/plans", **sent)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["location"]) == (status, code, location)


@pytest.fixture(scope="module")
def simulations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was simulated for one of these tests is there for the others: it takes seconds."""
    return tmp_path_factory.mktemp("plans")


@pytest.fixture
def too_small(tmp_path: Path, models_dir: Path, simulations: Path) -> Callable[..., Any]:
    """Posts to a service whose workers have a card of 1 GB."""
    settings: Settings = settings_in(tmp_path, models_dir).model_copy(update={"plan_device": "1GB"})
    settings.plan_cache_dir.parent.mkdir()
    settings.plan_cache_dir.symlink_to(simulations)

    def post(path: str, **request: Any) -> Any:
        with TestClient(create_app(settings), URL) as client:
            client.post("/datasets?filename=train.jsonl", content=chat_rows(8))
            (dataset,) = client.get("/datasets").json()["data"]
            return client.post(path, **{key: make(dataset["id"]) for key, make in request.items()})

    return post


def test_a_job_that_does_not_fit_is_refused_with_its_plan(too_small: Callable[..., Any]) -> None:
    answer = too_small("/jobs", json=spec_of)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["location"]) == (422, "invalid_spec", "/base_model")
    assert error["details"]["verdict"] == "does_not_fit"
    assert error["details"]["memory"]["needed"] > error["details"]["memory"]["usable"]


def test_forced_it_is_queued_with_a_warning(too_small: Callable[..., Any]) -> None:
    answer = too_small("/jobs", json=lambda dataset: spec_of(dataset, force=True))
    assert answer.status_code == 201
    job = answer.json()
    assert "not expected to fit" in job["warnings"][0]
    assert job["forecast"]["verdict"] == "does_not_fit"
    assert "force" not in job["spec"]


def test_force_goes_by_openais_wire_too(too_small: Callable[..., Any]) -> None:
    def body(dataset: str, **ours: Any) -> dict[str, Any]:
        length = {"training": {"max_seq_len_tokens": 128}}
        return {"model": "tiny", "training_file": dataset.replace("ds_", "file-"), "qlora": length | ours}

    refused = too_small("/v1/fine_tuning/jobs", json=body)
    assert refused.status_code == 400
    assert "force: true" in refused.json()["error"]["message"]
    assert too_small("/v1/fine_tuning/jobs", json=lambda dataset: body(dataset, force=True)).status_code == 200


def test_force_is_true_or_false(client: TestClient, dataset_id: str) -> None:
    error = client.post("/jobs", json=spec_of(dataset_id, force="yes")).json()["error"]
    assert (error["code"], error["location"]) == ("invalid_spec", "/force")
    assert client.post("/jobs", json=spec_of(dataset_id, force=False)).json()["warnings"] == []
