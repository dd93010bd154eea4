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

LLAMA_70B = MODELS["Llama-2-70B"]


def test_a_model_of_the_catalog_is_planned_for_this_machine(client: TestClient) -> None:
    response = client.post("/plans", json={"base_model": "tiny"})
    assert response.status_code == 200
    plan = response.json()
    assert (plan["object"], plan["verdict"], plan["source"]) == ("plan", "fits", "formula")
    assert plan["device"]["found_by"] in {"cpu", "nvml"}
    assert sum(plan["memory"]["categories"].values()) == plan["memory"]["allocated"]


def test_plan_of_a_70b_model_needs_neither_weights_nor_a_gpu(client: TestClient) -> None:
    request = {"config": LLAMA_70B, "device": "RTX 3090", "training": {"max_seq_len_tokens": 512, "batch_size": 1}}
    plan = client.post("/plans", json=request).json()
    assert plan["verdict"] == "does_not_fit"
    assert "packed weights alone" in plan["reason"]
    assert plan["largest"]["model"]
    assert client.post("/plans", json=request | {"device": "48GB"}).json()["verdict"] == "fits"


def test_a_complete_spec_can_be_planned_unchanged(client: TestClient, dataset_id: str) -> None:
    spec = spec_of(dataset_id, name="example", recipe="fast", validation={"fraction": 0.2}, priority=3)
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
        ({"config": LLAMA_70B | {"vocab_size": "a"}}, 422, "invalid_model", "/config"),
        ({"config": []}, 422, "invalid_spec", "/config"),
        ({"base_model": "tiny", "device": "RTX 3091"}, 422, "invalid_request", "/device"),
        ({"base_model": "tiny", "free_bytes": -1}, 422, "invalid_spec", "/free_bytes"),
        ({"base_model": "tiny", "adapter": {"rank": 8}}, 422, "invalid_spec", "/adapter/rank"),
        ({"base_model": "tiny", "dataset": {"id": "ds_none"}}, 404, "not_found", "/dataset/id"),
        ({"base_model": "tiny", "dataset": {"rows": [{"text": "a"}]}}, 422, "invalid_spec", "/dataset/rows"),
    ],
)
def test_error_names_its_location(client: TestClient, body: Any, status: int, code: str, location: str | None) -> None:
    sent = {"content": body} if isinstance(body, bytes) else {"json": body}
    response = client.post("/plans", **sent)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["location"]) == (status, code, location)


@pytest.fixture(scope="module")
def simulations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of simulations that these tests share, because a simulation takes seconds."""
    return tmp_path_factory.mktemp("plans")


@pytest.fixture
def post_to_small_device(tmp_path: Path, models_dir: Path, simulations: Path) -> Callable[..., Any]:
    """A function that posts to a service whose workers have a 1 GB card.

    Its keyword arguments are functions from the id of a stored dataset to the argument of the request.
    """
    settings: Settings = settings_in(tmp_path, models_dir).model_copy(update={"plan_device": "1GB"})
    settings.plan_cache_dir.parent.mkdir()
    settings.plan_cache_dir.symlink_to(simulations)

    def post(path: str, **request: Any) -> Any:
        with TestClient(create_app(settings), URL) as client:
            client.post("/datasets?filename=train.jsonl", content=chat_rows(8))
            (dataset,) = client.get("/datasets").json()["data"]
            return client.post(path, **{key: make(dataset["id"]) for key, make in request.items()})

    return post


def test_a_job_that_does_not_fit_is_refused_with_its_plan(post_to_small_device: Callable[..., Any]) -> None:
    response = post_to_small_device("/jobs", json=spec_of)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["location"]) == (422, "invalid_spec", "/base_model")
    assert error["details"]["verdict"] == "does_not_fit"
    assert error["details"]["memory"]["needed"] > error["details"]["memory"]["usable"]


def test_forced_job_that_does_not_fit_is_queued_with_a_warning(post_to_small_device: Callable[..., Any]) -> None:
    response = post_to_small_device("/jobs", json=lambda dataset: spec_of(dataset, force=True))
    assert response.status_code == 201
    job = response.json()
    assert "not expected to fit" in job["warnings"][0]
    assert job["forecast"]["verdict"] == "does_not_fit"
    assert "force" not in job["spec"]


def test_force_works_in_openais_api_too(post_to_small_device: Callable[..., Any]) -> None:
    def body(dataset: str, **own_fields: Any) -> dict[str, Any]:
        length = {"training": {"max_seq_len_tokens": 128}}
        return {"model": "tiny", "training_file": dataset.replace("ds_", "file-"), "qlora": length | own_fields}

    refused = post_to_small_device("/v1/fine_tuning/jobs", json=body)
    assert refused.status_code == 400
    assert "force: true" in refused.json()["error"]["message"]
    assert (
        post_to_small_device("/v1/fine_tuning/jobs", json=lambda dataset: body(dataset, force=True)).status_code == 200
    )


def test_force_must_be_true_or_false(client: TestClient, dataset_id: str) -> None:
    error = client.post("/jobs", json=spec_of(dataset_id, force="yes")).json()["error"]
    assert (error["code"], error["location"]) == ("invalid_spec", "/force")
    assert client.post("/jobs", json=spec_of(dataset_id, force=False)).json()["warnings"] == []
