from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from api.errors import located, status_of
from qlora_service import errors
from qlora_service.errors import InvalidDataset, InvalidModel, QLoRAError
from qlora_service.settings import Settings

SHAPE = {"code", "message", "location", "findings", "details"}


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (errors.InvalidRequest, 422),
        (errors.InvalidSpec, 422),
        (errors.InvalidDataset, 422),
        (errors.InvalidModel, 422),
        (errors.NotFound, 404),
        (errors.Conflict, 409),
        (errors.TooLarge, 413),
        (errors.Unavailable, 503),
        (errors.JobFailed, 500),
    ],
)
def test_every_error_of_the_domain_has_a_status(kind: type[QLoRAError], status: int) -> None:
    assert status_of(kind("…")) == status


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("DELETE", "/jobs", 405, "method_not_allowed"),
        ("GET", "/jobs?status=done", 422, "invalid_request"),
        ("GET", "/jobs?limit=0", 422, "invalid_request"),
        ("GET", "/jobs/job_none", 404, "not_found"),
        ("GET", "/jobs/%00%ff", 404, "not_found"),
    ],
)
def test_every_error_has_the_one_shape(bare_client: TestClient, method: str, path: str, status: int, code: str) -> None:
    response = bare_client.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert error.keys() == SHAPE
    assert error["code"] == code
    assert response.headers["X-Request-Id"]


def test_wrong_parameters_are_all_named(bare_client: TestClient) -> None:
    error = bare_client.get("/jobs?status=done&limit=0").json()["error"]
    assert error["location"] == "status"
    assert [finding["reason"].partition(":")[0] for finding in error["findings"]] == ["status", "limit"]


def test_unavailable_says_when_to_try_again(settings: Settings) -> None:
    from api.main import create_app

    app = create_app(settings)
    with TestClient(app) as client:
        app.state.draining = True
        response = client.get("/readyz")
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "5"


def test_route_says_where_an_error_belongs() -> None:
    with pytest.raises(InvalidModel) as caught, located({InvalidModel: "/base_model"}):
        raise InvalidModel("unknown")
    assert caught.value.location == "/base_model"
    with pytest.raises(InvalidDataset) as other, located({InvalidModel: "/base_model"}):
        raise InvalidDataset("empty", location="/dataset")
    assert other.value.location == "/dataset"
