from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from api.errors import status_of
from api.openai_errors import to_openai_error
from qlora_service.errors import Conflict, Finding, InvalidSpec, NotFound, QLoRAError, QuotaExceeded, Unavailable


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidSpec("no", location="/qlora/training/lr"), 400, "invalid_request_error"),
        (NotFound("no", location="file_id"), 404, "not_found_error"),
        (Conflict("no"), 409, "invalid_request_error"),
        (QuotaExceeded("no"), 429, "rate_limit_error"),
        (Unavailable("no"), 503, "server_error"),
        (QLoRAError("no"), 500, "server_error"),
    ],
)
def test_each_error_has_the_status_its_client_expects(error: QLoRAError, status: int, kind: str) -> None:
    body, openai_status, headers = to_openai_error(error.as_dict(), status_of(error))
    assert (openai_status, body["type"], body["code"], body["message"]) == (status, kind, error.code, "no")
    assert headers == ({"x-should-retry": "false"} if status == 409 else {})


@pytest.mark.parametrize(
    ("location", "param"),
    [("/method/type", "method.type"), ("file_id", "file_id"), (None, None), ("/", None), ("/model", "model")],
)
def test_location_is_translated_to_a_parameter(location: str | None, param: str | None) -> None:
    body, _, _ = to_openai_error(InvalidSpec("no", location=location).as_dict(), 422)
    assert body["param"] == param


def test_findings_and_details_are_kept() -> None:
    error = InvalidSpec("no", findings=[Finding("bad", "/a", 3, 7)], limit=4)
    body, _, _ = to_openai_error(error.as_dict(), 422)
    assert body["findings"] == [{"reason": "bad", "pointer": "/a", "line": 3, "byte_offset": 7}]
    assert body["details"] == {"limit": 4}


def test_client_does_not_retry_where_waiting_does_not_help() -> None:
    quota_error = QuotaExceeded("no").as_dict()
    assert to_openai_error(quota_error, 429, waiting_helps=False)[2] == {"x-should-retry": "false"}
    assert to_openai_error(quota_error, 429, waiting_helps=True)[2] == {}


def test_the_path_decides_the_shape(bare_client: TestClient) -> None:
    own = bare_client.get("/jobs/job_none")
    openai = bare_client.get("/v1/fine_tuning/jobs/job_none")
    assert (own.status_code, openai.status_code) == (404, 404)
    assert own.json()["error"].keys() == {"code", "message", "location", "findings", "details"}
    assert openai.json()["error"].keys() == {"message", "type", "param", "code", "findings", "details"}
    assert openai.headers["x-request-id"]


@pytest.mark.parametrize(
    ("path", "headers", "status", "code"),
    [
        ("/v1/nothing", {}, 404, "not_found"),
        ("/v1/files?limit=0", {}, 400, "invalid_request"),
        ("/v1/files", {"Host": "evil.example"}, 403, "forbidden"),
    ],
)
def test_errors_of_the_framework_and_of_middleware_have_the_openai_shape(
    bare_client: TestClient, path: str, headers: dict[str, str], status: int, code: str
) -> None:
    response = bare_client.get(path, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert "type" in response.json()["error"]
