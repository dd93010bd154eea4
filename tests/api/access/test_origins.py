"""Requests of browsers on behalf of web pages, and requests of programs."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from api.main import create_app
from qlora_service.settings import Settings
from tests.api.conftest import URL, chat_rows


def status_for(client: TestClient, host: str, method: str = "GET", path: str = "/jobs", **headers: str) -> int:
    """The status of a request with this Host header and these others, '_' in their names standing for '-'."""
    others = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.request(method, path, headers={"Host": host} | others).status_code


@pytest.fixture
def proxied_client(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    """A client of a service behind a proxy, without its lifespan: for requests that need no state."""
    data_dir = tmp_path_factory.mktemp("data")
    settings = Settings(data_dir=data_dir, host="0.0.0.0", allowed_hosts="GPU.example, ::2", keys="required")
    return TestClient(create_app(settings), URL)


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:9", "localhost.:8080", "127.0.0.1:8080", "[::1]:8080", "[::1]"]
)
def test_loopback_names_are_accepted_on_any_port(bare_client: TestClient, host: str) -> None:
    assert status_for(bare_client, host) == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "localhost@evil.example",
     "", "evil.example/localhost", "192.168.1.5", "[::2]:8080", "localhost:8080:8080", "evil.example\tlocalhost"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/jobs", "/openapi.json", "/docs", "/nothing"])
def test_other_host_names_are_refused_even_for_reads(bare_client: TestClient, host: str, path: str) -> None:
    assert status_for(bare_client, host, path=path) == 403


def test_refusal_names_the_setting_to_change(bare_client: TestClient) -> None:
    response = bare_client.get("/jobs", headers={"Host": "gpu.example:8080", "X-Request-Id": "trace-1"})
    error = response.json()["error"]
    assert (error["code"], error["location"]) == ("forbidden", "host")
    assert "'gpu.example:8080'" in error["message"]
    assert "QLORA_ALLOWED_HOSTS" in error["message"]
    assert response.headers["X-Request-Id"] == "trace-1"


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_checks_are_accepted_under_any_host_name(bare_client: TestClient, path: str) -> None:
    assert status_for(bare_client, "10.0.0.7:8080", path=path) == 200


def test_page_of_another_site_cannot_write(client: TestClient) -> None:
    for headers in (
        {"Host": "evil.example", "Origin": "http://evil.example"},  # DNS rebinding
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        response = client.post("/datasets", content=chat_rows(2), headers={"Content-Type": "text/plain"} | headers)
        assert response.status_code == 403, headers
        assert response.json()["error"]["code"] == "forbidden"
        assert "QLORA_ALLOWED_HOSTS" in response.json()["error"]["message"]
    assert client.get("/datasets").json()["data"] == []


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost:3000",
        "http://127.0.0.1:8080",
        "http://localhost",
        "http://localhost:8080.evil.example",
        "localhost:8080",
    ],
)
def test_page_of_another_port_or_name_of_this_machine_is_another_origin(bare_client: TestClient, origin: str) -> None:
    assert status_for(bare_client, "localhost:8080", "POST", Origin=origin) == 403
    assert status_for(bare_client, "localhost:8080", "GET", Origin=origin) == 200


def test_own_pages_and_programs_may_write(bare_client: TestClient) -> None:
    # 415: accepted by the guard, and refused because of its empty body.
    own = {"Origin": "http://localhost:8080", "Sec_Fetch_Site": "same-origin"}
    assert status_for(bare_client, "localhost:8080", "POST", **own) == 415
    assert status_for(bare_client, "localhost:8080", "POST", Sec_Fetch_Site="none") == 415
    assert status_for(bare_client, "localhost:8080", "POST") == 415


def test_allowed_hosts_are_accepted_in_addition_to_the_loopback(proxied_client: TestClient) -> None:
    assert status_for(proxied_client, "gpu.example", path="/nothing") == 404
    assert status_for(proxied_client, "gpu.example:443", path="/nothing") == 404
    assert status_for(proxied_client, "[::2]", path="/nothing") == 404
    assert status_for(proxied_client, "127.0.0.1:8080", path="/nothing") == 404
    assert status_for(proxied_client, "evil.example", path="/nothing") == 403
    # A proxy that terminates TLS, and forwards the Host header or replaces it.
    for host in ("gpu.example", "127.0.0.1:8080"):
        assert status_for(proxied_client, host, "DELETE", path="/nothing", Origin="https://gpu.example") == 404
        assert status_for(proxied_client, host, "DELETE", path="/nothing", Origin="https://evil.example") == 403


def test_listening_host_is_accepted(tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = Settings(data_dir=tmp_path_factory.mktemp("data"), host="192.168.1.5", keys="required")
    client = TestClient(create_app(settings), URL)
    assert status_for(client, "192.168.1.5:8080", path="/nothing") == 404
    assert status_for(client, "192.168.1.6:8080", path="/nothing") == 403


def test_star_accepts_every_host_and_page(tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = Settings(data_dir=tmp_path_factory.mktemp("data"), allowed_hosts="*")
    client = TestClient(create_app(settings), URL)
    assert status_for(client, "any.example", "DELETE", path="/nothing", Origin="http://other.example") == 404
