from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.main import create_app
from qlora_service.queue.claim import Progress
from qlora_service.queue.queue import Queue
from qlora_service.store.idempotency import RETRY_WINDOW
from tests.api.conftest import URL, chat_rows, settings_in, spec_of

JOBS = "/v1/fine_tuning/jobs"
LENGTH = {"training": {"max_seq_len_tokens": 128}}


@pytest.fixture
def file_id(dataset_id: str) -> str:
    return dataset_id.replace("ds_", "file-")


@pytest.fixture
def create(client: TestClient, file_id: str) -> Callable[..., Any]:
    """Posts a job on the stored file and returns the response."""

    def post(headers: dict[str, str] | None = None, **fields: Any) -> Any:
        body = {"model": "tiny", "training_file": file_id, "qlora": LENGTH} | fields
        return client.post(JOBS, json=body, headers=headers)

    return post


@pytest.fixture(scope="module")
def refuse(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Callable[..., Any]]:
    """Posts a job that must be refused, to an application that all tests share. Returns status and error."""
    with TestClient(create_app(settings_in(tmp_path_factory.mktemp("refusals"), models_dir)), URL) as client:
        form = {"file": ("train.jsonl", chat_rows(8))}
        file_id = client.post("/v1/files", data={"purpose": "fine-tune"}, files=form).json()["id"]

        def post(**fields: Any) -> tuple[int, dict[str, Any]]:
            body = {"model": "tiny", "training_file": file_id, "qlora": LENGTH} | fields
            answer = client.post(JOBS, json=body)
            assert client.get("/jobs").json()["data"] == []
            return answer.status_code, answer.json()["error"]

        yield post


def supervised(**hyperparameters: object) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


def test_job_reports_the_values_that_auto_resolved_to(create: Callable[..., Any], file_id: str) -> None:
    answer = create(suffix="orders", metadata={"team": "a"}, method=supervised(n_epochs="auto"))
    job = answer.json()
    assert answer.status_code == 200, answer.text
    assert (job["object"], job["status"], job["model"], job["training_file"]) == (
        "fine_tuning.job", "queued", "tiny", file_id,
    )  # fmt: skip
    resolved = {"n_epochs": 12, "batch_size": 16, "learning_rate_multiplier": 1.0, "beta": None}
    assert job["hyperparameters"] == job["method"]["supervised"]["hyperparameters"] == resolved
    for empty in ("finished_at", "fine_tuned_model", "validation_file", "trained_tokens", "error", "estimated_finish"):
        assert job[empty] is None, empty
    assert (job["result_files"], job["integrations"], job["metadata"]) == ([], [], {"team": "a"})
    assert job["organization_id"] == "local"
    spec = job["qlora"]["spec"]
    assert (spec["name"], spec["validation"]["fraction"], spec["training"]["seed"]) == ("orders", 0.0, job["seed"])


def test_both_apis_list_the_same_jobs(
    client: TestClient, create: Callable[..., Any], submit: Callable[..., str]
) -> None:
    first, second = create(suffix="a").json()["id"], submit(objective={"type": "supervised"}, name="b")
    assert [job["id"] for job in client.get(JOBS).json()["data"]] == [second, first]
    assert [job["id"] for job in client.get("/jobs").json()["data"]] == [second, first]
    assert client.get(f"{JOBS}/{second}").json()["qlora"] == client.get(f"/jobs/{second}").json()


def test_seed_is_random_unless_given(create: Callable[..., Any]) -> None:
    seeds = {create().json()["seed"] for _ in range(2)}
    assert len(seeds) == 2
    assert create(seed=0).json()["seed"] == 0


def test_validation_file_becomes_the_validation_dataset(client: TestClient, create: Callable[..., Any]) -> None:
    form = {"file": ("validation.jsonl", chat_rows(3, "Lyon"))}
    validation_id = client.post("/v1/files", data={"purpose": "fine-tune"}, files=form).json()["id"]
    job = create(validation_file=validation_id).json()
    assert job["validation_file"] == validation_id
    assert job["qlora"]["spec"]["validation"]["dataset_id"] == validation_id.replace("file-", "ds_")


def test_preferences_are_trained_with_dpo(client: TestClient) -> None:
    row = (
        b'{"input": {"messages": [{"role": "user", "content": "Hi"}]}, '
        b'"preferred_output": [{"role": "assistant", "content": "Hello"}], '
        b'"non_preferred_output": [{"role": "assistant", "content": "No"}]}\n'
    )
    pairs = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("p.jsonl", row * 3)}).json()["id"]
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "n_epochs": 2}}}
    answer = client.post(JOBS, json={"model": "tiny", "training_file": pairs, "method": method, "qlora": LENGTH})
    assert answer.status_code == 200, answer.text
    job = answer.json()
    assert job["method"]["dpo"]["hyperparameters"] == job["hyperparameters"]
    assert (job["hyperparameters"]["beta"], job["qlora"]["spec"]["objective"]["type"]) == (0.3, "dpo")


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}}, 400, "unsupported_method", "method"),
        ({"method": {"type": "magic"}}, 400, "invalid_request", "method.type"),
        ({"method": supervised(n_epochs=51)}, 400, "invalid_request", "method.supervised.hyperparameters.n_epochs"),
        ({"method": supervised(n_epochs=True)}, 400, "invalid_request", "method.supervised.hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": "large"}}, 400, "invalid_request", "hyperparameters.batch_size"),
        (
            {"hyperparameters": {"learning_rate_multiplier": 5000.0}, "qlora": {"recipe": "lit-llama-alpaca"}}, 400,
            "invalid_spec", "hyperparameters.learning_rate_multiplier",
        ),
        ({"hyperparameters": {}, "method": supervised(n_epochs=1)}, 400, "invalid_request", "hyperparameters"),
        ({"method": {"type": "dpo"}}, 400, "invalid_spec", "method.type"),
        ({"method": supervised() | {"type": "dpo"}}, 400, "invalid_request", "method.supervised"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, 400, "invalid_request", "integrations"),
        ({"model": "gpt-4o-mini"}, 400, "invalid_model", "model"),
        ({"training_file": "file-" + "0" * 22}, 404, "not_found", "training_file"),
        ({"training_file": "x"}, 404, "not_found", "training_file"),
        ({"validation_file": "file-" + "0" * 22}, 404, "not_found", "validation_file"),
        ({"suffix": "x" * 65}, 400, "invalid_request", "suffix"),
        ({"seed": -1}, 400, "invalid_request", "seed"),
        ({"metadata": {"a": 1}}, 400, "invalid_request", "metadata.a"),
        ({"surprise": 1}, 400, "invalid_request", "surprise"),
        ({"qlora": {"training": {"lr": 1}}}, 400, "invalid_spec", "qlora.training.lr"),
        ({"qlora": {"training": 3}}, 400, "invalid_spec", "qlora.training"),
        ({"qlora": {"recipe": "magic"}}, 400, "invalid_spec", "qlora.recipe"),
    ],
)  # fmt: skip
def test_invalid_field_is_refused_with_its_location(
    refuse: Callable[..., Any], fields: dict[str, Any], status: int, code: str, param: str
) -> None:
    actual_status, error = refuse(**fields)
    assert (actual_status, error["code"], error["param"]) == (status, code, param), error
    if status == 404:
        assert error["message"].startswith(f"there is no file '{fields[param]}'")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sufix": "a"}, "sufix: unknown field 'sufix': did you mean 'suffix'?"),
        (
            {"surprise": 1},
            "surprise: unknown field 'surprise': known fields: hyperparameters, integrations, ",
        ),
        (
            {"method": supervised(epochs=1)},
            "method.supervised.hyperparameters.epochs: unknown field 'epochs': did you mean 'n_epochs'?",
        ),
        ({"method": {}}, "method.type: this field is required"),
    ],
)
def test_unknown_or_missing_field_is_explained(
    refuse: Callable[..., Any], fields: dict[str, Any], message: str
) -> None:
    _, error = refuse(**fields)
    assert error["message"].startswith(message)
    assert error["param"] == message.partition(":")[0]


@pytest.mark.parametrize("body", ["null", "[]", '"job"'])
def test_body_that_is_not_an_object_is_refused(bare_client: TestClient, body: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = bare_client.post("/v1/fine_tuning/jobs", content=body, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, None)
    assert error["message"] == "the body has to be a JSON object"


@pytest.mark.parametrize(
    ("fields", "conflicts"),
    [
        ({"seed": 3, "qlora": {"training": {"seed": 3}}}, {"seed": "training.seed"}),
        ({"suffix": "a", "qlora": {"name": "b"}}, {"suffix": "name"}),
        ({"qlora": {"base_model": "tiny", "dataset": {}}}, {"model": "base_model", "training_file": "dataset"}),
        (
            {"hyperparameters": {"n_epochs": 2}, "qlora": {"training": {"max_steps": 3}}},
            {"hyperparameters.n_epochs": "training.max_steps"},
        ),
        ({"method": {"type": "supervised"}, "qlora": {"objective": {"type": "kto"}}}, {"type": "objective.type"}),
    ],
)  # fmt: skip
def test_setting_given_twice_is_refused_with_both_locations(
    refuse: Callable[..., Any], fields: dict[str, Any], conflicts: dict[str, str]
) -> None:
    status, error = refuse(**fields)
    assert status == 400
    findings = error["findings"]
    assert [finding["pointer"] for finding in findings] == [
        f"/qlora/{path.replace('.', '/')}" for path in conflicts.values()
    ]
    for finding, (field, path) in zip(findings, conflicts.items(), strict=True):
        assert f"{field} and qlora.{path} give the same setting" in finding["reason"]


def test_auto_yields_to_settings_in_qlora(create: Callable[..., Any]) -> None:
    method = supervised(n_epochs="auto", batch_size="auto", learning_rate_multiplier=2)
    qlora = {"recipe": "lit-llama-alpaca", "training": {"batch_size": 8}, "validation": {"fraction": 0.25}}
    job = create(method=method, qlora=qlora).json()
    spec = job["qlora"]["spec"]
    assert (spec["training"]["batch_size"], spec["training"]["epochs"], spec["training"]["learning_rate"]) == (
        8,
        5.0,
        6e-4,
    )
    assert spec["validation"]["fraction"] == 0.25
    assert job["hyperparameters"] == {"n_epochs": 5.0, "batch_size": 8, "learning_rate_multiplier": 2.0, "beta": None}


def test_job_with_max_steps_reports_no_epochs(create: Callable[..., Any]) -> None:
    job = create(qlora={"training": {"max_steps": 3, "max_seq_len_tokens": 128}}).json()
    assert job["hyperparameters"]["n_epochs"] is None


def test_jobs_are_paged_and_filtered(client: TestClient, create: Callable[..., Any]) -> None:
    ids = [create(metadata={"team": team} if team else None).json()["id"] for team in ("a", "b", "a", None)][::-1]
    first = client.get(JOBS, params={"limit": 3}).json()
    assert ([job["id"] for job in first["data"]], first["has_more"], first["last_id"]) == (ids[:3], True, ids[2])
    last = client.get(JOBS, params={"limit": 3, "after": ids[2]}).json()
    assert ([job["id"] for job in last["data"]], last["has_more"]) == (ids[3:], False)
    for query, expected in (
        ("metadata[team]=a", [ids[1], ids[3]]),
        ("metadata[team]=c", []),
        ("metadata=null", ids[:1]),
    ):
        assert [job["id"] for job in client.get(f"{JOBS}?{query}").json()["data"]] == expected


@pytest.mark.parametrize(
    "query", ["metadata=x", "metadata[a]=1&metadata=null", "metadata[a]=1&metadata[a]=2", "metadata[]=1", "after=%00"]
)
def test_invalid_filter_is_refused(bare_client: TestClient, query: str) -> None:
    assert bare_client.get(f"{JOBS}?{query}").status_code == 400


def test_job_is_paused_resumed_and_cancelled(client: TestClient, create: Callable[..., Any]) -> None:
    job_id = create().json()["id"]
    for verb, status in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        answer = client.post(f"{JOBS}/{job_id}/{verb}", headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["status"]) == (200, status)
    refused = client.post(f"{JOBS}/{job_id}/pause")
    assert (refused.status_code, refused.headers["x-should-retry"]) == (409, "false")


def test_loss_on_training_rows_is_not_reported_as_validation(
    client: TestClient, create: Callable[..., Any], queue: Queue
) -> None:
    job_id = create().json()["id"]
    claimed = queue.claim("worker")
    assert claimed is not None
    queue.report(claimed[0], Progress(), ("metrics", {"step": 1, "loss": float("nan")}))
    queue.report(claimed[0], Progress(), ("evaluation", {"step": 1, "eval_loss": 2.25, "eval_accuracy": 0.5}))
    evaluation, step = client.get(f"{JOBS}/{job_id}/events?limit=2").json()["data"]
    assert evaluation["message"] == "Step 1: loss on training rows=2.2500"
    assert evaluation["data"] == {"step": 1, "total_steps": None}
    assert step["message"] == "Step 1: training loss is not finite"


def test_events_are_listed_newest_first_in_pages(client: TestClient, create: Callable[..., Any], queue: Queue) -> None:
    job_id = create(qlora=LENGTH | {"validation": {"fraction": 0.25}}).json()["id"]
    claimed = queue.claim("worker")
    assert claimed is not None
    claim = claimed[0]
    queue.report(claim, Progress(phase="training", total_steps=8), ("log", {"message": "training"}))
    queue.report(claim, Progress(step=1), ("metrics", {"step": 1, "loss": 2.5}))
    queue.report(claim, Progress(), ("evaluation", {"step": 1, "eval_loss": 2.25, "eval_accuracy": 0.5}))
    queue.report(claim, Progress(eta_s=70.0, checkpoint_step=1))
    job = client.get(f"{JOBS}/{job_id}").json()
    assert job["status"] == "running"
    assert 60 <= job["estimated_finish"] - job["created_at"] <= 80
    (checkpoint,) = client.get(f"{JOBS}/{job_id}/checkpoints").json()["data"]
    assert checkpoint["fine_tuned_model_checkpoint"].endswith(":ckpt-step-1")
    next_page = client.get(f"{JOBS}/{job_id}/checkpoints", params={"after": checkpoint["id"]}).json()
    assert (next_page["data"], next_page["has_more"]) == ([], False)
    assert (checkpoint["metrics"]["train_loss"], checkpoint["metrics"]["full_valid_loss"]) == (2.5, 2.25)
    queue.fail(claim, {"code": "job_failed", "message": "it broke", "details": {"reason": "not_finite"}})

    events: list[dict[str, Any]] = []
    more = True
    while more:
        query = {"limit": 2} | ({"after": events[-1]["id"]} if events else {})
        page = client.get(f"{JOBS}/{job_id}/events", params=query).json()  # type: ignore[arg-type]
        events += page["data"]
        more = page["has_more"]
    assert [event["message"] for event in events] == [
        "The job has failed: it broke", "Step 1/8: validation loss=2.2500", "Step 1/8: training loss=2.5000",
        "training", "The job has started", "The job is queued",
    ]  # fmt: skip
    assert [event["type"] for event in events] == ["message", "metrics", "metrics", "message", "message", "message"]
    assert events[0]["level"] == "error"
    assert events[2]["data"] == {"step": 1, "train_loss": 2.5, "total_steps": 8}
    assert events[1]["data"]["full_valid_mean_token_accuracy"] == 0.5
    failed = client.get(f"{JOBS}/{job_id}").json()
    assert failed["error"] == {"code": "not_finite", "message": "it broke", "param": None}
    assert client.get(f"{JOBS}/{job_id}/checkpoints").json()["data"] == []


@pytest.mark.parametrize("subpath", ["", "/events", "/checkpoints"])
def test_unknown_job_is_not_found(bare_client: TestClient, subpath: str) -> None:
    answer = bare_client.get(f"{JOBS}/job_none{subpath}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_retry_of_a_create_returns_the_same_job(client: TestClient, create: Callable[..., Any]) -> None:
    def send(count: int, **fields: Any) -> Any:
        return create(headers={"X-Stainless-Retry-Count": str(count)}, **fields)

    first = send(0)
    retry = send(1)
    assert (retry.json(), retry.headers["Idempotent-Replayed"]) == (first.json(), "true")
    assert send(2).json() == first.json()
    second = send(0).json()  # a new request with the same content, not a retry
    assert second["id"] != first.json()["id"]
    assert send(1).json()["id"] == second["id"]
    assert send(1, suffix="else").json()["id"] not in {second["id"], first.json()["id"]}
    assert RETRY_WINDOW.total_seconds() == 600


def test_retry_of_a_delete_gets_the_first_response(client: TestClient, file_id: str) -> None:
    answers = [
        client.delete(f"/v1/files/{file_id}", headers={"X-Stainless-Retry-Count": count}) for count in ("0", "1")
    ]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()


def test_validation_dataset_of_a_native_job_is_its_validation_file(client: TestClient, dataset_id: str) -> None:
    validation_id = client.post("/datasets", content=chat_rows(3, "Lyon")).json()["id"]
    job = client.post("/jobs", json=spec_of(dataset_id, validation={"dataset_id": validation_id})).json()
    assert client.get(f"{JOBS}/{job['id']}").json()["validation_file"] == validation_id.replace("ds_", "file-")
