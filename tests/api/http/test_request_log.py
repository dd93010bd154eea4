from __future__ import annotations

import asyncio
from collections.abc import Callable

import anyio
import pytest
from fastapi.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send
from structlog.testing import capture_logs

from api.http.request_log import RequestLog
from qlora_service.settings import Settings
from tests.api.conftest import call, chat_rows

SECRET = "a sentence that only the dataset contains"


def test_request_keeps_the_id_it_was_sent_with(bare_client: TestClient) -> None:
    assert bare_client.get("/healthz", headers={"X-Request-Id": "trace-1"}).headers["X-Request-Id"] == "trace-1"


@pytest.mark.parametrize("sent_id", [b"", b"a b", b"x" * 129, "ü".encode()])
def test_request_without_a_valid_id_gets_a_generated_one(bare_client: TestClient, sent_id: bytes) -> None:
    first = bare_client.get("/healthz", headers={b"X-Request-Id": sent_id}).headers["X-Request-Id"]
    assert first.startswith("req_")
    assert bare_client.get("/healthz").headers["X-Request-Id"] != first


def test_each_request_is_one_log_line(bare_client: TestClient) -> None:
    with capture_logs() as lines:
        bare_client.get("/jobs/job_none?q=secret")
    (line,) = lines
    assert line["event"] == "request"
    assert (line["method"], line["path"], line["status"], line["code"]) == ("GET", "/jobs/job_none", 404, "not_found")
    assert line["duration_ms"] > 0
    assert "secret" not in str(line)


@pytest.mark.parametrize(
    ("method", "path", "level"),
    [("GET", "/jobs", "debug"), ("GET", "/nothing", "info"), ("HEAD", "/nothing", "info"), ("POST", "/jobs", "info")],
)
def test_successful_gets_are_logged_at_level_debug(bare_client: TestClient, method: str, path: str, level: str) -> None:
    with capture_logs() as lines:
        bare_client.request(method, path)
    assert [line["log_level"] for line in lines] == [level]


def test_rows_are_never_logged(client: TestClient) -> None:
    with capture_logs() as lines:
        client.post("/datasets", content=chat_rows(2, answer=SECRET))
        client.post("/datasets", content=f'{{"messages": "{SECRET}"}}\n'.encode())
        client.post("/jobs", json={"base_model": SECRET, "dataset": {"rows": [{"text": SECRET}]}})
    assert [line["status"] for line in lines] == [201, 422, 422]
    assert SECRET not in str(lines)


def test_defect_is_logged_once_and_answered_without_internals(
    client: TestClient, settings: Settings, finished_job: str
) -> None:
    # A manifest that no trainer writes: parsing it raises an unexpected exception.
    (manifest,) = settings.resolved_data_dir.glob("artifacts/jobs/*/1/manifest.json")
    manifest.write_text(f'{{"note": "{SECRET}"}}')
    with capture_logs() as lines:
        response = client.get(f"/jobs/{finished_job}/artifacts", headers={"X-Request-Id": "trace-2"})
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["code"] == "internal_error"
    assert error["details"] == {"request_id": "trace-2"}
    assert response.headers["X-Request-Id"] == "trace-2"
    assert "Traceback" not in response.text
    assert [line["event"] for line in lines] == ["request_failed", "request"]
    assert lines[0]["error"] == "ValidationError"
    assert "actions/artifacts.py" in str(lines[0]["frames"])
    assert SECRET not in str(lines)


def test_client_that_disconnects_is_not_a_defect(bare_client: TestClient, nothing_stored: Callable[[], None]) -> None:
    messages: list[Message] = [
        {"type": "http.request", "body": chat_rows(1), "more_body": True},
        {"type": "http.disconnect"},
    ]
    with capture_logs() as lines:
        assert call(bare_client.app, "POST", "/datasets", messages) == []
    assert [(line["event"], line["status"]) for line in lines] == [("request", 499)]
    nothing_stored()


@pytest.mark.parametrize(
    ("fault", "events"),
    [
        (anyio.BrokenResourceError(), ["request"]),
        (ZeroDivisionError(), ["request_failed", "request"]),
    ],
)
def test_stream_whose_client_disconnected_is_not_a_defect(fault: Exception, events: list[str]) -> None:
    """Raises what FastAPI's event producer raises for an event after the end of the response."""

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ExceptionGroup("unhandled errors in a TaskGroup", [ExceptionGroup("", [fault])])

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(_: Message) -> None: ...

    scope = {"type": "http", "method": "GET", "path": "/events", "headers": []}
    with capture_logs() as lines:
        asyncio.run(RequestLog(stream)(scope, receive, send))
    assert [line["event"] for line in lines] == events
