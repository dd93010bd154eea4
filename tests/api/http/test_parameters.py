from __future__ import annotations

import pytest
from fastapi.testclient import TestClient


@pytest.mark.parametrize("path", ["/jobs/%00", "/jobs/job_1%00/events", "/jobs/a/artifacts/b%00", "/v1/models/a%00b"])
def test_path_with_a_nul_character_is_not_found(bare_client: TestClient, path: str) -> None:
    assert bare_client.get(path).status_code == 404


@pytest.mark.parametrize(
    ("query", "location"), [("after=job%00", "after"), ("base_model=%00", "base_model"), ("a%00b=1", "a\\0b")]
)
def test_query_with_a_nul_character_is_refused_with_its_location(
    bare_client: TestClient, query: str, location: str
) -> None:
    response = bare_client.get(f"/jobs?limit=5&{query}")
    assert response.status_code == 422
    assert response.json()["error"]["location"] == location


def test_escaped_percent_sign_before_zeros_is_not_a_nul_character(bare_client: TestClient) -> None:
    assert bare_client.get("/jobs?base_model=%2500").status_code == 200
