from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.main import create_app
from qlora_service.actions.keys import open_key_registry
from qlora_service.domain.keys import Scope
from qlora_service.settings import Settings
from tests.api.conftest import URL


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    """A client with an admin key of the project team-a."""
    registry = open_key_registry(settings.resolved_database_url)
    _, secret = registry.create_key("team-a", "admin", [Scope.ADMIN])
    registry.close()
    app = create_app(settings.model_copy(update={"keys": "required"}))
    with TestClient(app, URL, headers={"Authorization": f"Bearer {secret}"}) as client:
        yield client


def test_admin_creates_lists_and_revokes_keys_of_its_own_project(client: TestClient) -> None:
    created = client.post("/keys", json={"name": "laptop", "scopes": ["read"]})
    assert created.status_code == 201
    assert created.headers["Cache-Control"] == "no-store"
    key = created.json()
    secret = key.pop("secret")
    assert (key["project"], key["name"], key["scopes"], key["revoked_at"]) == ("team-a", "laptop", ["read"], None)
    listed = client.get("/keys")
    assert listed.json()["data"][0] == key
    assert secret not in listed.text
    assert client.get("/jobs", headers={"Authorization": f"Bearer {secret}"}).status_code == 200
    revoked = client.delete(f"/keys/{key['id']}").json()
    assert revoked["revoked_at"] is not None
    assert client.get("/keys").json()["data"][0] == revoked


def test_default_scope_of_a_key_is_submit(client: TestClient) -> None:
    assert client.post("/keys", json={"name": "laptop"}).json()["scopes"] == ["submit"]


def test_repeated_request_creates_one_key_and_its_secret_is_not_stored(client: TestClient, settings: Settings) -> None:
    responses = [client.post("/keys", json={"name": "laptop"}, headers={"Idempotency-Key": "k"}) for _ in range(2)]
    first, replayed = (response.json() for response in responses)
    assert [response.status_code for response in responses] == [201, 201]
    assert responses[1].headers["Idempotent-Replayed"] == "true"
    secret = first.pop("secret")
    assert replayed.pop("secret") is None
    assert replayed == first
    assert len(client.get("/keys").json()["data"]) == 2
    for path in settings.resolved_data_dir.glob("state.db*"):
        assert secret.encode() not in path.read_bytes()


def test_last_admin_key_cannot_revoke_itself(client: TestClient) -> None:
    (admin_key,) = client.get("/keys").json()["data"]
    refused = client.delete(f"/keys/{admin_key['id']}")
    assert refused.status_code == 409
    assert "`qlora keys revoke`" in refused.json()["error"]["message"]
    assert client.post("/keys", json={"name": "second", "scopes": ["admin"]}).status_code == 201
    assert client.delete(f"/keys/{admin_key['id']}").status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "location"),
    [
        (b"{", 400, None),
        (b'{"name": "a", "name": "b"}', 400, "/name"),
        (b"[]", 422, ""),
        (b"{}", 422, "/name"),
        (b'{"name": ""}', 422, "/name"),
        (b'{"name": 1}', 422, "/name"),
        (b'{"name": "\\n"}', 422, "name"),
        (b'{"name": "a", "scopes": ["root"]}', 422, "/scopes/0"),
        (b'{"name": "a", "scopes": []}', 422, "/scopes"),
        (b'{"name": "a", "project": "team-b"}', 422, "/project"),
        (b'{"name": "' + b"a" * 20_000 + b'"}', 413, None),
    ],
)
def test_invalid_key_request_is_refused(client: TestClient, body: bytes, status: int, location: str | None) -> None:
    refused = client.post("/keys", content=body, headers={"Content-Type": "application/json"})
    assert refused.status_code == status, refused.text
    error: dict[str, Any] = refused.json()["error"]
    if status == 422:
        assert error["location"] == location
    assert len(client.get("/keys").json()["data"]) == 1
