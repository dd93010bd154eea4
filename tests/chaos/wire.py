"""Fuzzing of a real API process with valid and invalid requests, generated from its OpenAPI document.

Every operation of the document is tested. Where the document has an example of an id, many requests have the id of a
stored object.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup

from api.main import create_app
from qlora_service.actions.keys import KeyRegistry
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.queue.claim import Progress
from qlora_service.settings import Settings
from qlora_service.store.database import Database
from tests.running_api import RunningApi, open_queue, succeed

MODEL = "SmolLM2-135M-Instruct"
"""Name of the tiny model: that of the document's examples"""
ANSWER_S, STREAM_S, LATE_STREAM_S = 20, 0.1, 2
"""Longest time for an answer; for reading a stream; and for reading a stream whose headers came late"""
ID = re.compile(r"([a-z]+[_-])[0-9a-f]{22}|ft:.*")
"""The document's examples of ids and of tuned models"""
PRELUDE = """
import os, socket
os.environ |= {"QLORA_KEYS": "required", "QLORA_WEBHOOK_PRIVATE": "true"}

# Generated hosts of webhooks may exist: all of them resolve to this machine, where no port is open.
def getaddrinfo(host, port, *_, **__):
    return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", port))]

socket.getaddrinfo = getaddrinfo
"""
# A valid request may still be refused: for an unknown model, two settings that exclude each other, or an ended job.
ACCEPTED = ["2xx", "3xx", "400", "401", "403", "404", "409", "413", "415", "416", "422", "429"]
CONFIG = {
    "checks": {"positive_data_acceptance": {"expected-statuses": ACCEPTED}},
    # Every request has a valid key, except those of the check `ignored_auth`. Undeclared parameters and headers are no
    # violation.
    "generation": {"with-security-parameters": False, "allow-extra-parameters": False},
    # No worker runs, so chats are answered with 503, which is documented.
    "operations": [
        {
            "include-path-regex": "completions$",
            "checks": {
                "not_a_server_error": {"expected-statuses": ["2xx", "4xx", "503"]},
                "positive_data_acceptance": {"expected-statuses": [*ACCEPTED, "503"]},
            },
        }
    ],
}


@dataclass(frozen=True)
class Stand:
    """A running API with stored objects, and its document with their ids as examples."""

    url: str
    headers: dict[str, str]
    """Headers of every request, with its key"""
    schema: schemathesis.BaseSchema


@contextmanager
def stand(directory: Path, model: Path) -> Iterator[Stand]:
    """Starts the API on `directory` with `model` as its base model."""
    Catalog(directory / "models").import_model(MODEL, model)
    key = _first_key(directory)
    headers = {"Authorization": f"Bearer {key}"}
    with RunningApi(directory, PRELUDE) as api:
        with httpx2.Client(base_url=api.url, headers=headers, timeout=ANSWER_S, trust_env=False) as http:
            ids = _store_objects(directory, http)
            document = _with_ids(http.get("/openapi.json").json(), ids)
        schema = schemathesis.openapi.from_dict(document, config=schemathesis.Config.from_dict(CONFIG))
        yield Stand(api.url, headers, schema)


@cache
def operations() -> list[str]:
    """Every operation of the document as method and path, DELETE last."""
    paths = create_app(Settings()).openapi()["paths"]
    pairs = [(method, path) for path, methods in paths.items() for method in methods]
    return [f"{method.upper()} {path}" for method, path in sorted(pairs, key=lambda pair: pair[0] == "delete")]


@dataclass(frozen=True)
class FuzzResult:
    """Outcome of the requests to all operations."""

    operations: int
    faults: list[str]
    """First 5xx or undocumented answer of each operation, if any"""


def attack_all(directory: Path, model: Path, examples: int) -> FuzzResult:
    """Sends up to `examples` requests to every operation; each call generates other requests."""
    faults = []
    with stand(directory, model) as target:
        for operation in operations():
            try:
                attack(target, operation, examples, same_every_time=False)
            except (Exception, FailureGroup):
                faults.append(f"{operation}: {traceback.format_exc()}")
    return FuzzResult(len(operations()), faults)


def attack(target: Stand, operation: str, examples: int, *, same_every_time: bool) -> None:
    """Sends up to `examples` requests to an operation, half of which violate its schema.

    Raises:
        Exception, FailureGroup: an answer was a 5xx or undocumented; the text has a command that repeats the request.
    """
    method, path = operation.split(" ", 1)
    documented = target.schema[path][method]
    success = next(answer for status, answer in documented.definition.raw["responses"].items() if status < "300")
    streams = success.get("content", {}).keys() == {"text/event-stream"}

    with requests.Session() as session:
        session.trust_env = False

        @settings(
            max_examples=examples,
            derandomize=same_every_time,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.one_of(documented.as_strategy(mode) for mode in GenerationMode))
        def send(case: schemathesis.Case) -> None:
            try:
                case.call_and_validate(target.url, session, target.headers, timeout=STREAM_S if streams else ANSWER_S)
            except requests.exceptions.ReadTimeout:
                if not streams:
                    raise
                case.call_and_validate(target.url, session, target.headers, timeout=LATE_STREAM_S)

        send()


def _first_key(directory: Path) -> str:
    database = Database(f"sqlite:///{directory / 'state.db'}")
    database.migrate()
    with closing(KeyRegistry(database)) as registry:
        created = registry.create_first_key()
    assert created is not None
    return created[1]


def _store_objects(directory: Path, http: httpx2.Client) -> dict[str, list[str]]:
    """Stores objects of every kind and jobs of every status; their ids by prefix."""

    def post(path: str, **content: Any) -> str:
        return str(http.post(path, **content).raise_for_status().json()["id"])

    rows = b"".join(b'{"prompt": "%d plus one is", "completion": " %d."}\n' % (n, n + 1) for n in range(8))
    dataset_id = post("/datasets?filename=train.jsonl", content=rows)
    spec = {"base_model": MODEL, "dataset": {"id": dataset_id}, "training": {"max_seq_len_tokens": 128}}
    jobs = [post("/jobs", json=spec) for _ in range(6)]
    queue = open_queue(directory)
    for end in (
        lambda claim: succeed(directory, queue, claim, {"adapter_model.safetensors": bytes(range(256))}),
        lambda claim: queue.fail(claim, {"code": "job_failed", "message": "the trainer died", "details": {}}),
        lambda _: None,
    ):
        claimed = queue.claim("worker")
        assert claimed is not None
        queue.report(claimed[0], Progress("training", 1, 8), ("metrics", {"step": 1, "loss": 1.5, "tokens": 64}))
        end(claimed[0])
    post(f"/jobs/{jobs[3]}/cancel")
    post(f"/jobs/{jobs[4]}/pause")
    upload = {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": len(rows), "mime_type": "application/jsonl"}
    hook = {"name": "ends", "url": "https://hooks.invalid/ends", "event_types": ["fine_tuning.job.succeeded"]}
    uploads = [post("/v1/uploads", json=upload) for _ in range(2)]
    return {
        "job_": jobs,
        "ds_": [dataset_id],
        "file-": [post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("b.jsonl", rows + rows)})],
        "upload_": uploads,
        "part_": [post(f"/v1/uploads/{uploads[0]}/parts", files={"data": ("part", rows)})],
        "wh_": [post("/v1/webhook_endpoints", json=hook) for _ in range(2)],
        "key_": [post("/keys", json={"name": "another"})],
        "ft:": [model["id"] for model in http.get("/v1/models").json()["data"] if model["id"].startswith("ft:")],
    }


def _with_ids(document: Any, ids: Mapping[str, list[str]]) -> Any:
    """The document with stored ids instead of its examples."""
    if isinstance(document, dict):
        return {key: _with_ids(value, ids) for key, value in document.items()}
    if isinstance(document, list):
        stored = _stored_ids(document[0], ids) if document else []
        return stored or [_with_ids(value, ids) for value in document]
    return next(iter(_stored_ids(document, ids)), document)


def _stored_ids(example: Any, ids: Mapping[str, list[str]]) -> list[str]:
    """Stored ids of the example's kind; none if the example is not an id."""
    match = ID.fullmatch(example) if isinstance(example, str) else None
    return ids.get(match[1] or "ft:", []) if match else []
