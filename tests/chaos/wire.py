"""Requests made of our own OpenAPI document, valid ones and ones that break it, at a real API process.

Every operation of the document is tried, whoever added it. Where the document has an example of an id, the requests
have, often enough, the ids of objects that are there.
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
from qlora_service.actions.keys import Access
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.queue.claim import Progress
from qlora_service.settings import Settings
from qlora_service.store.database import Database
from tests.running_api import RunningApi, open_queue, succeed

MODEL = "SmolLM2-135M-Instruct"
"""What the document's examples call a base model; here it is the tiny one"""
ANSWER_S, STREAM_S, LATE_STREAM_S = 20, 0.1, 2
"""The longest an answer may take; how long a stream is read; and how long one whose head was late"""
ID = re.compile(r"([a-z]+[_-])[0-9a-f]{22}|ft:.*")
"""The document's examples of ids and of tuned models"""
PRELUDE = """
import os, socket
os.environ |= {"QLORA_KEYS": "required", "QLORA_WEBHOOK_PRIVATE": "true"}

# Webhooks get hosts that are made up, but may be somebody's: all of them are this machine, where nothing listens.
def getaddrinfo(host, port, *_, **__):
    return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", port))]

socket.getaddrinfo = getaddrinfo
"""
# A document cannot say that a model is unknown, that two settings exclude each other, that a job has ended.
ACCEPTED = ["2xx", "3xx", "400", "401", "403", "404", "409", "413", "415", "416", "422", "429"]
CONFIG = {
    "checks": {"positive_data_acceptance": {"expected-statuses": ACCEPTED}},
    # Every request has a good key, but for those with which the check `ignored_auth` looks for a door. Parameters and
    # headers that nobody declared are no violation.
    "generation": {"with-security-parameters": False, "allow-extra-parameters": False},
    # No worker runs here, so nobody can answer: 503 is right, and documented.
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
    """A running API with stored objects, and its document with their ids."""

    url: str
    headers: dict[str, str]
    """With the key that every request needs"""
    schema: schemathesis.BaseSchema


@contextmanager
def stand(directory: Path, model: Path) -> Iterator[Stand]:
    Catalog(directory / "models").import_model(MODEL, model)
    key = _first_key(directory)
    headers = {"Authorization": f"Bearer {key}"}
    with RunningApi(directory, PRELUDE) as api:
        with httpx2.Client(base_url=api.url, headers=headers, timeout=ANSWER_S, trust_env=False) as http:
            ids = _stock(directory, http)
            document = _with_ids(http.get("/openapi.json").json(), ids)
        schema = schemathesis.openapi.from_dict(document, config=schemathesis.Config.from_dict(CONFIG))
        yield Stand(api.url, headers, schema)


@cache
def operations() -> list[str]:
    """Every operation of the document, as method and path; what takes away comes last."""
    paths = create_app(Settings()).openapi()["paths"]
    found = [(method, path) for path, methods in paths.items() for method in methods]
    return [f"{method.upper()} {path}" for method, path in sorted(found, key=lambda one: one[0] == "delete")]


@dataclass(frozen=True)
class Answers:
    operations: int
    faults: list[str]
    """Of each operation the first answer that was a 5xx, or none that the document foresees."""


def attack_all(directory: Path, model: Path, examples: int) -> Answers:
    """Other requests every time it is called."""
    faults = []
    with stand(directory, model) as target:
        for operation in operations():
            try:
                attack(target, operation, examples, same_every_time=False)
            except (Exception, FailureGroup):
                faults.append(f"{operation}: {traceback.format_exc()}")
    return Answers(len(operations()), faults)


def attack(target: Stand, operation: str, examples: int, *, same_every_time: bool) -> None:
    """Sends up to so many requests to an operation, half of them against its schema.

    Raises:
        Exception, FailureGroup: an answer was a 5xx, or one that the document does not foresee; the text tells how to
            send the request again.
    """
    method, path = operation.split(" ", 1)
    described = target.schema[path][method]
    success = next(answer for status, answer in described.definition.raw["responses"].items() if status < "300")
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
        @given(st.one_of(described.as_strategy(mode) for mode in GenerationMode))
        def ask(case: schemathesis.Case) -> None:
            try:
                case.call_and_validate(target.url, session, target.headers, timeout=STREAM_S if streams else ANSWER_S)
            except requests.exceptions.ReadTimeout:
                if not streams:
                    raise
                case.call_and_validate(target.url, session, target.headers, timeout=LATE_STREAM_S)

        ask()


def _first_key(directory: Path) -> str:
    database = Database(f"sqlite:///{directory / 'state.db'}")
    database.migrate()
    with closing(Access(database)) as access:
        made = access.create_first_key()
    assert made is not None
    return made[1]


def _stock(directory: Path, http: httpx2.Client) -> dict[str, list[str]]:
    """Stores something of every kind, a job of every status among it; the ids, by what they begin with."""

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
    """The document with stored ids in place of its examples of them."""
    if isinstance(document, dict):
        return {key: _with_ids(value, ids) for key, value in document.items()}
    if isinstance(document, list):
        stored = _stored(document[0], ids) if document else []
        return stored or [_with_ids(value, ids) for value in document]
    return next(iter(_stored(document, ids)), document)


def _stored(example: Any, ids: Mapping[str, list[str]]) -> list[str]:
    match = ID.fullmatch(example) if isinstance(example, str) else None
    return ids.get(match[1] or "ft:", []) if match else []
