"""Two projects on one service: whatever the OpenAPI document offers, neither learns what the other has.

A route with a new kind of id fails here until OWNED says how to make one that belongs to somebody else, and a body
that names something of a new kind until REFERENCES says how to send it.
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

from qlora_service.actions.keys import open_access
from qlora_service.domain.keys import Scope
from qlora_service.models.catalog.catalog import Catalog
from tests.api.conftest import chat_rows, spec_of
from tests.running_api import RunningApi, open_queue, succeed

PRELUDE = "import os\nos.environ |= {'QLORA_KEYS': 'required', 'QLORA_WEBHOOK_PRIVATE': 'true'}"
OPEN = {"/healthz", "/readyz"}
WEBHOOK_URL = "http://127.0.0.1:9/"  # nobody listens there
OWN_PART = re.compile(r"[0-9a-f]{22}")
"""What tells an id from all others of its kind."""

Request = dict[str, Any]


class Tenant:
    """A project: what it asks with, and what it owns."""

    def __init__(self, api: RunningApi, project: str) -> None:
        self._data_dir = api.data_dir
        access = open_access(f"sqlite:///{api.data_dir / 'state.db'}")
        _, self.secret = access.create_key(project, "admin", [Scope.ADMIN])
        access.close()
        self.http = httpx2.Client(base_url=api.url, headers={"Authorization": f"Bearer {self.secret}"}, timeout=60)
        self._rows = chat_rows(8, answer=f"{project} knows")

    def made(self, path: str, **request: Any) -> str:
        response = self.http.post(path, **request)
        assert response.is_success, response.text
        return str(response.json()["id"])

    @cached_property
    def dataset(self) -> str:
        return self.made("/datasets?filename=rows.jsonl", content=self._rows)

    @cached_property
    def job(self) -> str:
        """A job that has ended, so that its events end too."""
        job_id = self.made("/jobs", json=spec_of(self.dataset))
        assert self.http.post(f"/jobs/{job_id}/cancel").json()["status"] == "cancelled"
        return job_id

    @cached_property
    def finished_job(self) -> str:
        """A job that has published something; of those in the queue it is the first."""
        job_id = self.made("/jobs", json=spec_of(self.dataset, priority=100))
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
        """The file with the metrics of the finished job."""
        (results,) = self.http.get(f"/v1/fine_tuning/jobs/{self.finished_job}").json()["result_files"]
        return str(results)

    @cached_property
    def file(self) -> str:
        files = {"file": ("other.jsonl", self._rows + chat_rows(1))}
        return self.made("/v1/files", files=files, data={"purpose": "fine-tune"})

    @cached_property
    def upload(self) -> str:
        asked = {"bytes": 10, "filename": "rows.jsonl", "mime_type": "application/jsonl", "purpose": "fine-tune"}
        return self.made("/v1/uploads", json=asked)

    @cached_property
    def part(self) -> str:
        return self.made(f"/v1/uploads/{self.upload}/parts", files={"data": b"0123456789"})

    @cached_property
    def key(self) -> str:
        return self.made("/keys", json={"name": "laptop"})

    @cached_property
    def webhook_endpoint(self) -> str:
        asked = {"name": "told", "url": WEBHOOK_URL, "event_types": ["fine_tuning.job.succeeded"]}
        return self.made("/v1/webhook_endpoints", json=asked)


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
"""Something of every kind that a path names."""

OWNERLESS = {"name": "adapter_config.json"}
"""Path parameters that mean something only within what an id beside them names."""

QUERY = {"base_model": "tiny"}
"""Values of the query parameters that a route cannot do without."""

BODIES: dict[str, Request] = {
    "/v1/uploads/{upload_id}/parts": {"files": {"data": b"x"}},
    "/v1/uploads/{upload_id}/complete": {"json": {"part_ids": ["part_none"]}},
    "/v1/webhook_endpoints/{webhook_endpoint_id}": {"json": {"name": "told"}},
    "/v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret": {"json": {}},
    "/v1/webhook_endpoints/{webhook_endpoint_id}/test": {"json": {"event_type": "fine_tuning.job.succeeded"}},
}
"""Bodies of the requests that are refused without one before anything is looked up."""


def _chat(model: str) -> Request:
    return {"url": "/v1/chat/completions", "json": {"model": model, "messages": [{"role": "user", "content": "Hi"}]}}


REFERENCES: dict[str, tuple[Callable[[Tenant], str], Callable[[Tenant, str], Request]]] = {
    "DatasetRef.id": (
        lambda owner: owner.dataset,
        lambda _, named: {"url": "/jobs", "json": spec_of(named)},
    ),
    "Validation.dataset_id": (
        lambda owner: owner.dataset,
        lambda asker, named: {"url": "/jobs", "json": spec_of(asker.dataset, validation={"dataset_id": named})},
    ),
    "CreateFineTuningJob.training_file": (
        lambda owner: owner.file,
        lambda _, named: {"url": "/v1/fine_tuning/jobs", "json": {"model": "tiny", "training_file": named}},
    ),
    "CreateFineTuningJob.validation_file": (
        lambda owner: owner.file,
        lambda asker, named: {
            "url": "/v1/fine_tuning/jobs",
            "json": {"model": "tiny", "training_file": asker.file, "validation_file": named},
        },
    ),
    "CreateFineTuningJob.model": (
        lambda owner: owner.model,
        lambda asker, named: {
            "url": "/v1/fine_tuning/jobs", "json": {"model": named, "training_file": asker.file}
        },
    ),
    "CompleteUpload.part_ids": (
        lambda owner: owner.part,
        lambda asker, named: {"url": f"/v1/uploads/{asker.upload}/complete", "json": {"part_ids": [named]}},
    ),
    "CreateChatCompletion.model": (lambda owner: owner.model, lambda _, named: _chat(named)),
    "CreateCompletion.model": (
        lambda owner: owner.model,
        lambda _, named: {"url": "/v1/completions", "json": {"model": named, "prompt": "Hi"}},
    ),
}  # fmt: skip
"""What a body names, by its schema and field: something of the kind, and the request that names it."""

SHARED = {"JobRequest.base_model", "PlanRequest.base_model"}
"""Fields that look like references, and name what belongs to no project."""


@pytest.fixture(scope="module")
def api(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApi]:
    data_dir = tmp_path_factory.mktemp("data")
    Catalog(data_dir / "models").import_model("tiny", tiny_model)
    with RunningApi(data_dir, PRELUDE) as running:
        yield running


@pytest.fixture(scope="module")
def mine(api: RunningApi) -> Iterator[Tenant]:
    tenant = Tenant(api, "mine")
    yield tenant
    tenant.http.close()


@pytest.fixture(scope="module")
def theirs(api: RunningApi) -> Iterator[Tenant]:
    tenant = Tenant(api, "theirs")
    yield tenant
    tenant.http.close()


@pytest.fixture(scope="module")
def document(mine: Tenant) -> dict[str, Any]:
    found: dict[str, Any] = mine.http.get("/openapi.json").json()
    return found


def operations(document: dict[str, Any], *methods: str) -> Iterator[tuple[str, str]]:
    """Method and path of every guarded operation that names something in its path, in the order of these methods."""
    for method in methods:
        for path, described in document["paths"].items():
            if method in described and "{" in path:
                yield method, path


def request_to(document: dict[str, Any], method: str, path: str, ids: dict[str, str]) -> Request:
    """The request with these ids in its path, and with whatever else it cannot do without."""
    named = {name: ids.get(name) or OWNERLESS[name] for name in re.findall(r"\{(\w+)\}", path)}
    parameters = document["paths"][path][method].get("parameters", [])
    wanted = [each["name"] for each in parameters if each["in"] == "query" and each.get("required")]
    body = BODIES.get(path, {}) if method == "post" else {}
    return {"url": path.format(**named), "params": {name: QUERY[name] for name in wanted}, **body}


def missing(id_: str) -> str:
    """An id of the same kind that nothing has."""
    assert OWN_PART.search(id_), id_
    return OWN_PART.sub(22 * "0", id_)


def refusal(response: httpx2.Response, *asked: str) -> tuple[int, str]:
    """Status and body, without what tells the ids that were asked for from others."""
    text = response.text
    for id_ in asked:
        text = text.replace(OWN_PART.findall(id_)[0], "…")
    return response.status_code, text


def test_what_another_project_has_is_answered_as_if_it_were_not_there(
    document: dict[str, Any], mine: Tenant, theirs: Tenant
) -> None:
    checked = set()
    for method, path in operations(document, "get", "head", "post", "put", "patch", "delete"):
        kinds = [name for name in re.findall(r"\{(\w+)\}", path) if name not in OWNERLESS]
        assert kinds, f"{path} names nothing that has an owner"
        assert set(kinds) <= OWNED.keys(), f"{path}: OWNED has no rule for what it names"
        assert_is_not_there(document, mine, method, path, {kind: OWNED[kind](theirs) for kind in kinds})
        checked.add((method, path))
    assert len(checked) > 30


def test_results_of_another_projects_job_are_not_there_either(
    document: dict[str, Any], mine: Tenant, theirs: Tenant
) -> None:
    asked = [(method, path) for method, path in operations(document, "get", "delete") if "{file_id}" in path]
    assert len(asked) >= 3
    for method, path in asked:
        assert_is_not_there(document, mine, method, path, {"file_id": theirs.results})
    assert theirs.http.get(f"/v1/files/{theirs.results}").status_code == 200


def assert_is_not_there(
    document: dict[str, Any], asker: Tenant, method: str, path: str, foreign: dict[str, str]
) -> None:
    """The answer to a request that names these ids is the one to ids that nothing has."""
    absent = {kind: missing(id_) for kind, id_ in foreign.items()}
    answered = asker.http.request(method, **request_to(document, method, path, foreign))
    expected = asker.http.request(method, **request_to(document, method, path, absent))
    assert answered.status_code == 404, (method, path, answered.text)
    assert refusal(answered, *foreign.values()) == refusal(expected, *absent.values()), (method, path)
    assert dict(answered.headers).keys() == dict(expected.headers).keys()


def test_owner_finds_all_of_it(api: RunningApi, document: dict[str, Any]) -> None:
    """Otherwise the test above would be of requests that nobody may send. What is deleted comes last."""
    owner = Tenant(api, "owner")
    for method, path in operations(document, "get", "head", "post", "put", "patch", "delete"):
        owned = {name: OWNED[name](owner) for name in re.findall(r"\{(\w+)\}", path) if name in OWNED}
        answered = owner.http.request(method, **request_to(document, method, path, owned))
        assert answered.status_code not in (401, 403, 404, 405, 422), (method, path, answered.text)
    owner.http.close()


def test_body_that_names_what_another_project_has_is_answered_as_if_it_were_not_there(
    document: dict[str, Any], mine: Tenant, theirs: Tenant
) -> None:
    named = set(references(document)) - SHARED
    assert named == REFERENCES.keys()
    for field, (of_owner, request) in REFERENCES.items():
        foreign = of_owner(theirs)
        absent = missing(foreign)
        answered = mine.http.post(**request(mine, foreign))
        expected = mine.http.post(**request(mine, absent))
        assert answered.is_client_error, (field, answered.text)
        assert refusal(answered, foreign) == refusal(expected, absent), field
        own = of_owner(mine)
        with suppress(httpx2.ReadTimeout):  # it is being answered, and not refused
            assert refusal(mine.http.post(**request(mine, own), timeout=1), own) != refusal(answered, foreign), field


def references(document: dict[str, Any]) -> Iterator[str]:
    """Schema and field of whatever a request's body can name."""
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


def test_lists_show_nothing_of_another_project(document: dict[str, Any], mine: Tenant, theirs: Tenant) -> None:
    foreign = {kind: rule(theirs) for kind, rule in OWNED.items()} | {"finished job": theirs.finished_job}
    listing = [path for path, described in document["paths"].items() if "{" not in path and "get" in described]
    assert len(listing) > 8
    seen = set()
    for path in set(listing) - OPEN:
        own, others = listed(theirs, path), listed(mine, path)
        seen |= {kind for kind, id_ in foreign.items() if id_ in own}
        # Ids of one thing differ between the wires, but for their own part.
        assert not [kind for kind, id_ in foreign.items() if OWN_PART.findall(id_)[0] in others], path
        assert "theirs" not in others, path
    # Uploads under way are in no list.
    assert seen == foreign.keys() - {"upload_id"}


def listed(tenant: Tenant, path: str) -> str:
    """All that the route tells, or the beginning of what it goes on telling."""
    if path != "/events":
        return tenant.http.get(path).text
    lines: list[str] = []
    silence = httpx2.Timeout(5, read=1)
    with tenant.http.stream("GET", path, params={"after": 0}, timeout=silence) as stream, suppress(httpx2.ReadTimeout):
        for line in stream.iter_lines():
            lines.append(line)
    return "\n".join(lines)


def test_projects_choose_their_idempotency_keys_freely(mine: Tenant, theirs: Tenant) -> None:
    for tenant, rows in ((mine, b'{"text": "mine"}\n'), (theirs, b'{"text": "theirs"}\n')):
        response = tenant.http.post("/datasets", content=rows, headers={"Idempotency-Key": "same"})
        assert response.status_code == 201, response.text
        assert "Idempotent-Replayed" not in response.headers
        assert tenant.http.get(f"/datasets/{response.json()['id']}").status_code == 200


def test_same_rows_are_a_dataset_of_each_project(mine: Tenant, theirs: Tenant) -> None:
    ids = [tenant.made("/datasets", content=b'{"text": "same"}\n') for tenant in (mine, theirs)]
    assert ids[0] != ids[1]
    assert theirs.http.delete(f"/datasets/{ids[1]}").status_code == 200
    # Of the bytes that both have, one project's deletion takes nothing from the other.
    assert mine.http.get(f"/datasets/{ids[0]}/preview?base_model=tiny").status_code == 200
