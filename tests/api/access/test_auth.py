from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest
from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient

from api.access.auth import ANONYMOUS, CACHED_S, Authenticator, StreamGuard, authenticated
from api.http.request_log import RequestLog
from api.main import create_app
from qlora_service.actions.keys import open_key_registry
from qlora_service.domain.keys import Scope
from qlora_service.errors import RateLimited, Unauthenticated
from qlora_service.settings import Settings
from tests.api.conftest import URL, Server, settings_in

OPEN = {("get", "/healthz"), ("get", "/readyz")}
OPEN_PAGES = ("/docs", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css", "/openapi.json")
Operation = tuple[str, str, dict[str, Any]]


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def make_key(settings: Settings, *scopes: Scope, project: str = "local") -> tuple[str, str]:
    """Id and secret of a new key, created as `qlora keys` does."""
    registry = open_key_registry(settings.resolved_database_url)
    key, secret = registry.create_key(project, "test", scopes)
    registry.close()
    return key.id, secret


@pytest.fixture
def settings(tmp_path: Path, models_dir: Path) -> Settings:
    return settings_in(tmp_path, models_dir).model_copy(update={"keys": "required"})


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[TestClient]:
    """An application that requires keys, shared by requests that must not change its state."""
    settings = settings_in(tmp_path_factory.mktemp("locked"), models_dir).model_copy(update={"keys": "required"})
    make_key(settings, Scope.ADMIN)
    with TestClient(create_app(settings), URL) as client:
        yield client


@pytest.fixture(scope="module")
def secrets(locked: TestClient) -> dict[Scope, str]:
    """The secret of one key per scope."""
    settings: Settings = locked.app.state.settings  # type: ignore[attr-defined]
    return {scope: make_key(settings, scope)[1] for scope in Scope}


def operations(client: TestClient) -> Iterator[Operation]:
    """Method, path with its parameters filled in, and description of every documented operation."""
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        for method, operation in methods.items():
            yield method, re.sub(r"\{[^}]+\}", "x", path), operation


def guarded(client: TestClient) -> list[Operation]:
    """Every documented operation that requires a key."""
    return [operation for operation in operations(client) if operation[:2] not in OPEN]


def test_every_operation_except_the_open_ones_requires_a_key(locked: TestClient) -> None:
    schemes = locked.get("/openapi.json").json()["components"]["securitySchemes"]
    assert [(scheme["type"], scheme["scheme"]) for scheme in schemes.values()] == [("http", "bearer")]
    security_of = {(method, path): operation.get("security") for method, path, operation in operations(locked)}
    assert {route for route, security in security_of.items() if not security} == OPEN
    assert all(security == [{name: []} for name in schemes] for security in security_of.values() if security)


def test_guarded_operations_without_a_key_are_answered_401(locked: TestClient) -> None:
    assert len(guarded(locked)) > 20
    for method, path, _ in guarded(locked):
        response = locked.request(method, path)
        assert response.status_code == 401, (method, path)
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "unauthenticated"
        if method == "get":  # HEAD is not documented
            assert locked.head(path).status_code in (401, 405), path


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer qk_unknown"},
        {"Authorization": "Bearer qk_\xff\x80"},
        {"Authorization": "Basic {secret}"},
        {"Authorization": "{secret}"},
        {"X-Api-Key": "{secret}"},
        {"Cookie": "Authorization={secret}"},
    ],
)
def test_only_a_valid_bearer_key_is_accepted(
    locked: TestClient, secrets: dict[Scope, str], headers: dict[str, str]
) -> None:
    sent = {name: value.format(secret=secrets[Scope.READ]).encode("latin-1") for name, value in headers.items()}
    assert locked.get("/jobs", headers=sent).status_code == 401
    assert locked.get("/jobs", headers=bearer(secrets[Scope.READ])).status_code == 200


def test_key_in_the_url_is_not_accepted(locked: TestClient, secrets: dict[Scope, str]) -> None:
    for name in ("key", "api_key", "access_token", "token"):
        assert locked.get(f"/jobs?{name}={secrets[Scope.ADMIN]}").status_code == 401


def test_health_and_documentation_need_no_key(locked: TestClient) -> None:
    for path in (*(path for _, path in OPEN), *OPEN_PAGES):
        assert locked.get(path).status_code == 200, path


def test_body_of_a_request_without_a_key_is_not_read(locked: TestClient) -> None:
    for method, path, operation in guarded(locked):
        if "requestBody" in operation:
            refused = locked.request(method, path, content=b"{", headers={"Content-Type": "application/json"})
            assert refused.status_code == 401, (method, path)


def test_key_with_scope_read_cannot_change_anything(locked: TestClient, secrets: dict[Scope, str]) -> None:
    changes = [(method, path, operation) for method, path, operation in guarded(locked) if method != "get"]
    assert len(changes) >= 7
    for method, path, operation in changes:
        response = locked.request(method, path, headers=bearer(secrets[Scope.READ]))
        assert response.status_code == 403, (method, path)
        error = response.json()["error"]
        assert error["code"] == "forbidden"
        needed = "admin" if "admin" in operation["tags"] else "submit"
        assert f"the scope '{needed}'" in error["message"]


@pytest.mark.parametrize("scope", [Scope.READ, Scope.SUBMIT])
def test_operations_on_keys_need_the_scope_admin(locked: TestClient, secrets: dict[Scope, str], scope: Scope) -> None:
    key_operations = [operation for operation in guarded(locked) if "admin" in operation[2]["tags"]]
    assert len(key_operations) >= 3
    for method, path, _ in key_operations:
        response = locked.request(method, path, headers=bearer(secrets[scope]))
        assert response.status_code == 403, (method, path)
        assert "'admin'" in response.json()["error"]["message"]
        assert locked.request(method, path, headers=bearer(secrets[Scope.ADMIN])).status_code not in (401, 403)


def test_scope_includes_lower_scopes(locked: TestClient, secrets: dict[Scope, str]) -> None:
    for scope, may_submit in {Scope.READ: False, Scope.SUBMIT: True, Scope.ADMIN: True}.items():
        headers = bearer(secrets[scope])
        assert locked.get("/jobs", headers=headers).status_code == 200
        # 415: authorized, and refused because of its empty body.
        assert locked.post("/jobs", headers=headers).status_code == (415 if may_submit else 403)


class Seconds:
    """A monotonic clock that the test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_revoked_key_is_refused_when_its_cache_entry_expires(settings: Settings) -> None:
    key_id, secret = make_key(settings, Scope.READ)
    registry, clock = open_key_registry(settings.resolved_database_url), Seconds()
    authenticator = Authenticator(registry, clock=clock)

    def authorized_key() -> str | None:
        return anyio.run(authenticator.authorize, secret, Scope.READ).key_id

    assert authorized_key() == key_id
    registry.revoke_key(key_id)
    clock.now += CACHED_S / 2
    assert authorized_key() == key_id
    clock.now += CACHED_S / 2
    for _ in range(2):
        with pytest.raises(Unauthenticated, match="revoked"):
            authorized_key()
    registry.close()


def test_cached_key_needs_no_database(settings: Settings) -> None:
    _, secret = make_key(settings, Scope.READ)
    registry, clock = open_key_registry(settings.resolved_database_url), Seconds()
    authenticator = Authenticator(registry, clock=clock)

    async def authorize(times: int) -> None:
        for _ in range(times):
            await authenticator.authorize(secret, Scope.READ)

    anyio.run(authorize, 1)
    database = settings.resolved_data_dir / "state.db"
    registry.close()
    database.rename(database.with_name("away.db"))
    anyio.run(authorize, 100)
    clock.now += CACHED_S
    with pytest.raises(Exception, match="no such table"):
        anyio.run(authorize, 1)


def test_event_stream_ends_when_its_key_is_revoked(settings: Settings) -> None:
    (key_id, secret), clock = make_key(settings, Scope.READ), Seconds()
    registry = open_key_registry(settings.resolved_database_url)
    app = FastAPI()
    app.state.authenticator = Authenticator(registry, clock=clock)
    app.add_middleware(StreamGuard)
    app.add_middleware(RequestLog)
    ended = []

    async def events() -> AsyncIterator[bytes]:
        try:
            yield b"data: before\n\n"
            registry.revoke_key(key_id)
            yield b"data: within the second\n\n"
            clock.now += CACHED_S
            yield b"data: after\n\n"
            raise AssertionError("the stream continues")
        finally:
            ended.append(True)

    @app.get("/events", dependencies=[Depends(authenticated)])
    def stream(media_type: str) -> StreamingResponse:
        return StreamingResponse(events(), media_type=media_type)

    with TestClient(app, URL) as client:
        answer = client.get("/events?media_type=text/event-stream", headers=bearer(secret))
    assert answer.text == "data: before\n\ndata: within the second\n\n"
    assert ended == [True]
    registry.close()


def test_every_key_has_its_own_rate_limit(settings: Settings) -> None:
    limited = settings.model_copy(update={"max_requests_per_minute": 3})
    first, second = make_key(settings, Scope.READ)[1], make_key(settings, Scope.READ)[1]
    with TestClient(create_app(limited), URL) as client:
        responses = [client.get("/jobs", headers=bearer(first)) for _ in range(4)]
        assert [response.status_code for response in responses] == [200, 200, 200, 429]
        assert responses[3].json()["error"]["code"] == "rate_limited"
        assert responses[3].headers["Retry-After"] == "20"
        assert client.get("/jobs", headers=bearer(second)).status_code == 200
        assert client.get("/jobs").status_code == 401
        assert client.get("/healthz").status_code == 200


def test_forbidden_requests_count_toward_the_rate_limit(settings: Settings) -> None:
    secret = make_key(settings, Scope.READ)[1]
    with TestClient(create_app(settings.model_copy(update={"max_requests_per_minute": 2})), URL) as client:
        responses = [client.post("/jobs", json={}, headers=bearer(secret)) for _ in range(3)]
    assert [response.status_code for response in responses] == [403, 403, 429]


def test_with_keys_off_every_caller_is_the_default_project() -> None:
    authenticator = Authenticator(None, max_requests_per_minute=1)
    assert anyio.run(authenticator.authorize, None, Scope.ADMIN) == ANONYMOUS
    with pytest.raises(RateLimited):
        anyio.run(authenticator.authorize, "qk_whatever", Scope.READ)


def test_objects_created_with_keys_off_belong_to_the_default_project(settings: Settings) -> None:
    with TestClient(create_app(settings.model_copy(update={"keys": "off"})), URL) as client:
        dataset = client.post("/datasets", content=b'{"text": "a"}\n').json()["id"]
    default_key = make_key(settings, Scope.READ)[1]
    team_key = make_key(settings, Scope.READ, project="team-a")[1]
    with TestClient(create_app(settings), URL) as client:
        assert client.get(f"/datasets/{dataset}", headers=bearer(default_key)).status_code == 200
        assert client.get(f"/datasets/{dataset}", headers=bearer(team_key)).status_code == 404


def test_first_start_prints_one_key_and_no_key_is_logged(
    start_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_LOG_LEVEL", "DEBUG")
    server = start_server()
    assert httpx2.get(f"{server.url}/healthz").status_code == 200
    (secret,) = re.findall(r"^ +export QLORA_API_KEY=(qk_\S+)$", server.log.read_text(), re.MULTILINE)
    assert not any(secret in str(line) for line in server.lines())
    with httpx2.Client(base_url=server.url) as client:
        assert client.get("/jobs").status_code == 401
        assert client.get("/jobs", headers=bearer(secret)).status_code == 200
        assert client.get(f"/jobs?api_key={secret}").status_code == 401
        created = client.post("/keys", json={"name": "laptop"}, headers=bearer(secret)).json()
        assert client.get("/jobs/job_none", headers=bearer(created["secret"])).status_code == 404
        assert client.get("/jobs", headers=bearer("qk_unknown_to_the_service")).status_code == 401
        assert client.get("/jobs", headers=bearer(created["secret"])).status_code == 200
    server.stop()
    log = server.log.read_text()
    assert {line["status"] for line in server.lines() if line["event"] == "request"} >= {200, 201, 401, 404}
    assert log.count(secret) == 1
    assert created["secret"] not in log
    assert "qk_unknown_to_the_service" not in log

    restarted = start_server()
    assert httpx2.get(f"{restarted.url}/jobs", headers=bearer(secret)).status_code == 200
    assert "QLORA_API_KEY" not in restarted.log.read_text()
