"""Isolation of two projects on one service: no operation of the OpenAPI document reveals objects of another project.

A route with a new kind of id fails here until OWNED says how to create the object in a project; a body that references
a new kind of object fails until REFERENCES says how to send it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx2
import pytest

from qlora_service.actions.keys import open_key_registry
from qlora_service.domain.keys import Scope
from qlora_service.models.catalog.catalog import Catalog
from tests.api.conftest import chat_rows, spec_of
from tests.running_api import RunningApi, open_queue, succeed

PRELUDE = "import os\nos.environ |= {'QLORA_KEYS': 'required', 'QLORA_WEBHOOK_PRIVATE': 'true'}"
OPEN = {"/healthz", "/readyz"}
WEBHOOK_URL = "http://127.0.0.1:9/"  # no process listens there
UNIQUE_PART = re.compile(r"[0-9a-f]{22}")
"""The part of an id that distinguishes it from other ids of its kind."""

Request = dict[str, Any]


class Tenant:
    """A project: a client with its admin key, and its objects, created on first access."""

    def __init__(self, api: RunningApi, project: str) -> None:
        self._data_dir = api.data_dir
        registry = open_key_registry(f"sqlite:///{api.data_dir / 'state.db'}")
        _, self.secret = registry.create_key(project, "admin", [Scope.ADMIN])
        registry.close()
        self.http = httpx2.Client(base_url=api.url, headers={"Authorization": f"Bearer {self.secret}"}, timeout=60)
        self._rows = chat_rows(8, answer=f"{project} knows")

    def create(self, path: str, **request: Any) -> str:
        """The id of the object that this POST creates."""
        response = self.http.post(path, **request)
        assert response.is_success, response.text
        return str(response.json()["id"])

    @cached_property
    def dataset(self) -> str:
        return self.create("/datasets?filename=rows.jsonl", content=self._rows)

    @cached_property
    def job(self) -> str:
        """A cancelled job, so that its event stream ends."""
        job_id = self.create("/jobs", json=spec_of(self.dataset))
        assert self.http.post(f"/jobs/{job_id}/cancel").json()["status"] == "cancelled"
        return job_id

    @cached_property
    def finished_job(self) -> str:
        """A succeeded job with a published file; its priority makes it the first in the queue."""
        job_id = self.create("/jobs", json=spec_of(self.dataset, priority=100))
        queue = open_queue(self._data_dir)
        claimed = queue.claim("worker")
        assert claimed is not None
        assert claimed[1].id == job_id
        succeed(self._data_dir, queue, claimed[0], {"adapter_config.json": b"{}"})
        return job_id

    @cached_property
    def model(self) -> str:
        return str(self.http.get(f"/v1/fine_tuning/jobs/{self.finished_job}").json()["fine_tuned_model"])

    @cached_property
    def results(self) -> str:
        """The id of the file with the metrics of the finished job."""
        (results,) = self.http.get(f"/v1/fine_tuning/jobs/{self.finished_job}").json()["result_files"]
        return str(results)

    @cached_property
    def file(self) -> str:
        files = {"file": ("other.jsonl", self._rows + chat_rows(1))}
        return self.create("/v1/files", files=files, data={"purpose": "fine-tune"})

    @cached_property
    def upload(self) -> str:
        body = {"bytes": 10, "filename": "rows.jsonl", "mime_type": "application/jsonl", "purpose": "fine-tune"}
        return self.create("/v1/uploads", json=body)

    @cached_property
    def part(self) -> str:
        return self.create(f"/v1/uploads/{self.upload}/parts", files={"data": b"0123456789"})

    @cached_property
    def key(self) -> str:
        return self.create("/keys", json={"name": "laptop"})

    @cached_property
    def webhook_endpoint(self) -> str:
        body = {"name": "receiver", "url": WEBHOOK_URL, "event_types": ["fine_tuning.job.succeeded"]}
        return self.create("/v1/webhook_endpoints", json=body)


OWNED: dict[str, Callable[[Tenant], str]] = {
    "dataset_id": lambda owner: owner.dataset,
    "file_id": lambda owner: owner.file,
    "fine_tuning_job_id": lambda owner: owner.job,
    "job_id": lambda owner: owner.job,
    "key_id": lambda owner: owner.key,
    "model": lambda owner: owner.model,
    "upload_id": lambda owner: owner.upload,
    "webhook_endpoint_id": lambda owner: owner.webhook_endpoint,
}
"""For each path parameter that is an id: a function from a project to the id of one of its objects."""

OWNERLESS = {"name": "adapter_config.json"}
"""Path parameters that name a part of the object whose id is in the same path."""

QUERY = {"base_model": "tiny"}
"""Values of required query parameters."""

BODIES: dict[str, Request] = {
    "/v1/uploads/{upload_id}/parts": {"files": {"data": b"x"}},
    "/v1/uploads/{upload_id}/complete": {"json": {"part_ids": ["part_none"]}},
    "/v1/webhook_endpoints/{webhook_endpoint_id}": {"json": {"name": "receiver"}},
    "/v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret": {"json": {}},
    "/v1/webhook_endpoints/{webhook_endpoint_id}/test": {"json": {"event_type": "fine_tuning.job.succeeded"}},
}
"""Bodies of requests that would otherwise be refused before the object is looked up."""


def _chat(model: str) -> Request:
    return {"url": "/v1/chat/completions", "json": {"model": model, "messages": [{"role": "user", "content": "Hi"}]}}


REFERENCES: dict[str, tuple[Callable[[Tenant], str], Callable[[Tenant, str], Request]]] = {
    "DatasetRef.id": (
        lambda owner: owner.dataset,
        lambda _, id_: {"url": "/jobs", "json": spec_of(id_)},
    ),
    "Validation.dataset_id": (
        lambda owner: owner.dataset,
        lambda sender, id_: {"url": "/jobs", "json": spec_of(sender.dataset, validation={"dataset_id": id_})},
    ),
    "CreateFineTuningJob.training_file": (
        lambda owner: owner.file,
        lambda _, id_: {"url": "/v1/fine_tuning/jobs", "json": {"model": "tiny", "training_file": id_}},
    ),
    "CreateFineTuningJob.validation_file": (
        lambda owner: owner.file,
        lambda sender, id_: {
            "url": "/v1/fine_tuning/jobs",
            "json": {"model": "tiny", "training_file": sender.file, "validation_file": id_},
        },
    ),
    "CreateFineTuningJob.model": (
        lambda owner: owner.model,
        lambda sender, id_: {
            "url": "/v1/fine_tuning/jobs", "json": {"model": id_, "training_file": sender.file}
        },
    ),
    "CompleteUpload.part_ids": (
        lambda owner: owner.part,
        lambda sender, id_: {"url": f"/v1/uploads/{sender.upload}/complete", "json": {"part_ids": [id_]}},
    ),
    "CreateChatCompletion.model": (lambda owner: owner.model, lambda _, id_: _chat(id_)),
    "CreateCompletion.model": (
        lambda owner: owner.model,
        lambda _, id_: {"url": "/v1/completions", "json": {"model": id_, "prompt": "Hi"}},
    ),
}  # fmt: skip
"""By schema and field of a body: the id of an object of its owner, and a request of a sender that references the id."""

SHARED = {"JobRequest.base_model", "PlanRequest.base_model"}
"""Fields that look like references, but name objects that belong to no project."""


@pytest.fixture(scope="module")
def api(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApi]:
    data_dir = tmp_path_factory.mktemp("data")
    Catalog(data_dir / "models").import_model("tiny", tiny_model)
    with RunningApi(data_dir, PRELUDE) as running:
        yield running


@pytest.fixture(scope="module")
def team_a(api: RunningApi) -> Iterator[Tenant]:
    tenant = Tenant(api, "team-a")
    yield tenant
    tenant.http.close()


@pytest.fixture(scope="module")
def team_b(api: RunningApi) -> Iterator[Tenant]:
    tenant = Tenant(api, "team-b")
    yield tenant
    tenant.http.close()


@pytest.fixture(scope="module")
def document(team_a: Tenant) -> dict[str, Any]:
    openapi: dict[str, Any] = team_a.http.get("/openapi.json").json()
    return openapi


def operations(document: dict[str, Any], *methods: str) -> Iterator[tuple[str, str]]:
    """Method and path of every operation with a path parameter, in the order of these methods."""
    for method in methods:
        for path, described in document["paths"].items():
            if method in described and "{" in path:
                yield method, path


def request_to(document: dict[str, Any], method: str, path: str, ids: dict[str, str]) -> Request:
    """The request with these ids in its path, and with its required query parameters and body."""
    path_values = {name: ids.get(name) or OWNERLESS[name] for name in re.findall(r"\{(\w+)\}", path)}
    parameters = document["paths"][path][method].get("parameters", [])
    required = [each["name"] for each in parameters if each["in"] == "query" and each.get("required")]
    body = BODIES.get(path, {}) if method == "post" else {}
    return {"url": path.format(**path_values), "params": {name: QUERY[name] for name in required}, **body}


def nonexistent(id_: str) -> str:
    """An id of the same kind without an object."""
    assert UNIQUE_PART.search(id_), id_
    return UNIQUE_PART.sub(22 * "0", id_)


def anonymized(response: httpx2.Response, *ids: str) -> tuple[int, str]:
    """Status and body, with the unique part of these ids replaced."""
    text = response.text
    for id_ in ids:
        text = text.replace(UNIQUE_PART.findall(id_)[0], "…")
    return response.status_code, text


def test_objects_of_another_project_are_answered_as_nonexistent(
    document: dict[str, Any], team_a: Tenant, team_b: Tenant
) -> None:
    checked = set()
    for method, path in operations(document, "get", "head", "post", "put", "patch", "delete"):
        kinds = [name for name in re.findall(r"\{(\w+)\}", path) if name not in OWNERLESS]
        assert kinds, f"{path} has no parameter that is an id of an owned object"
        assert set(kinds) <= OWNED.keys(), f"{path}: OWNED lacks one of its parameters"
        assert_answered_as_nonexistent(document, team_a, method, path, {kind: OWNED[kind](team_b) for kind in kinds})
        checked.add((method, path))
    assert len(checked) > 30


def test_result_files_of_another_projects_job_are_answered_as_nonexistent(
    document: dict[str, Any], team_a: Tenant, team_b: Tenant
) -> None:
    routes = [(method, path) for method, path in operations(document, "get", "delete") if "{file_id}" in path]
    assert len(routes) >= 3
    for method, path in routes:
        assert_answered_as_nonexistent(document, team_a, method, path, {"file_id": team_b.results})
    assert team_b.http.get(f"/v1/files/{team_b.results}").status_code == 200


def assert_answered_as_nonexistent(
    document: dict[str, Any], sender: Tenant, method: str, path: str, foreign: dict[str, str]
) -> None:
    """Asserts that the response to a request with these ids equals the response to ids without an object."""
    absent = {kind: nonexistent(id_) for kind, id_ in foreign.items()}
    response = sender.http.request(method, **request_to(document, method, path, foreign))
    expected = sender.http.request(method, **request_to(document, method, path, absent))
    assert response.status_code == 404, (method, path, response.text)
    assert anonymized(response, *foreign.values()) == anonymized(expected, *absent.values()), (method, path)
    assert dict(response.headers).keys() == dict(expected.headers).keys()


def test_owner_has_access_to_its_objects(api: RunningApi, document: dict[str, Any]) -> None:
    """Shows that the tests above send valid requests. Deletions come last."""
    owner = Tenant(api, "owner")
    for method, path in operations(document, "get", "head", "post", "put", "patch", "delete"):
        owned = {name: OWNED[name](owner) for name in re.findall(r"\{(\w+)\}", path) if name in OWNED}
        response = owner.http.request(method, **request_to(document, method, path, owned))
        assert response.status_code not in (401, 403, 404, 405, 422), (method, path, response.text)
    owner.http.close()


def test_references_to_objects_of_another_project_are_answered_as_nonexistent(
    document: dict[str, Any], team_a: Tenant, team_b: Tenant
) -> None:
    fields = set(references(document)) - SHARED
    assert fields == REFERENCES.keys()
    for field, (id_of, request_with) in REFERENCES.items():
        foreign = id_of(team_b)
        absent = nonexistent(foreign)
        response = team_a.http.post(**request_with(team_a, foreign))
        expected = team_a.http.post(**request_with(team_a, absent))
        assert response.is_client_error, (field, response.text)
        assert anonymized(response, foreign) == anonymized(expected, absent), field
        own = id_of(team_a)
        with suppress(httpx2.ReadTimeout):  # the request was accepted, and waits for a slot
            accepted = team_a.http.post(**request_with(team_a, own), timeout=1)
            assert anonymized(accepted, own) != anonymized(response, foreign), field


def references(document: dict[str, Any]) -> Iterator[str]:
    """Schema and field of every reference in the body of a request."""
    schemas, seen = document["components"]["schemas"], set()

    def walk(part: Any) -> Iterator[str]:
        if isinstance(part, list):
            for each in part:
                yield from walk(each)
        elif isinstance(part, dict):
            reference = part.get("$ref")
            if isinstance(reference, str) and reference not in seen:
                seen.add(reference)
                name = reference.rpartition("/")[2]
                fields = schemas[name].get("properties", {})
                yield from (f"{name}.{field}" for field in fields if re.search(r"(^|_)(ids?|files?|model)$", field))
                yield from walk(schemas[name])
            for key, each in part.items():
                if key not in ("example", "examples"):
                    yield from walk(each)

    for described in document["paths"].values():
        for operation in described.values():
            yield from walk(operation.get("requestBody"))


def test_lists_contain_no_objects_of_another_project(document: dict[str, Any], team_a: Tenant, team_b: Tenant) -> None:
    foreign = {kind: id_of(team_b) for kind, id_of in OWNED.items()} | {"finished job": team_b.finished_job}
    listing = [path for path, described in document["paths"].items() if "{" not in path and "get" in described]
    assert len(listing) > 8
    seen = set()
    for path in set(listing) - OPEN:
        list_of_owner, list_of_other = listed(team_b, path), listed(team_a, path)
        seen |= {kind for kind, id_ in foreign.items() if id_ in list_of_owner}
        # The service's own API and OpenAI's give an object different ids with the same unique part.
        assert not [kind for kind, id_ in foreign.items() if UNIQUE_PART.findall(id_)[0] in list_of_other], path
        assert "team-b" not in list_of_other, path
    # Incomplete uploads are in no list.
    assert seen == foreign.keys() - {"upload_id"}


def listed(tenant: Tenant, path: str) -> str:
    """The body of the response; of the event stream, the events until one second passes without one."""
    if path != "/events":
        return tenant.http.get(path).text
    lines: list[str] = []
    silence = httpx2.Timeout(5, read=1)
    with tenant.http.stream("GET", path, params={"after": 0}, timeout=silence) as stream, suppress(httpx2.ReadTimeout):
        for line in stream.iter_lines():
            lines.append(line)
    return "\n".join(lines)


def test_projects_can_use_the_same_idempotency_key(team_a: Tenant, team_b: Tenant) -> None:
    for tenant, rows in ((team_a, b'{"text": "a"}\n'), (team_b, b'{"text": "b"}\n')):
        response = tenant.http.post("/datasets", content=rows, headers={"Idempotency-Key": "same"})
        assert response.status_code == 201, response.text
        assert "Idempotent-Replayed" not in response.headers
        assert tenant.http.get(f"/datasets/{response.json()['id']}").status_code == 200


def test_same_rows_are_a_separate_dataset_in_each_project(team_a: Tenant, team_b: Tenant) -> None:
    ids = [tenant.create("/datasets", content=b'{"text": "same"}\n') for tenant in (team_a, team_b)]
    assert ids[0] != ids[1]
    assert team_b.http.delete(f"/datasets/{ids[1]}").status_code == 200
    # The projects share the stored bytes; a deletion by one project keeps the dataset of the other.
    assert team_a.http.get(f"/datasets/{ids[0]}/preview?base_model=tiny").status_code == 200
