from __future__ import annotations

import shutil

from fastapi.testclient import TestClient

from qlora_service.settings import Settings


def test_healthy_service_passes_both_checks(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ok"}


def test_service_without_its_scratch_directory_is_alive_but_not_ready(client: TestClient, settings: Settings) -> None:
    shutil.rmtree(settings.tmp_dir)
    response = client.get("/readyz")
    assert response.status_code == 503
    assert "data disk cannot be written" in response.json()["error"]["message"]
    assert int(response.headers["Retry-After"]) > 0
    assert client.get("/healthz").status_code == 200


def test_service_with_a_damaged_database_is_not_ready(client: TestClient, settings: Settings) -> None:
    for path in settings.resolved_data_dir.glob("state.db*"):
        path.write_bytes(b"not a database" * 1000)
    response = client.get("/readyz")
    assert response.status_code == 503
    assert "database does not answer" in response.json()["error"]["message"]
