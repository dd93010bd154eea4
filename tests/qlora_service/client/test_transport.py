"""Requests through a proxy that answers 503, and to a server that records the request headers."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qlora_service.client import Client, ServiceError, Unreachable
from qlora_service.client.transport import Backoff
from qlora_service.errors import InvalidRequest
from tests.breaking_proxy import BreakingProxy

SPEC = {"base_model": "tiny", "training": {"max_seq_len_tokens": 64}}
EMPTY = b'{"data": []}'
BUSY = b'{"error": {"code": "CODE", "message": "no", "location": null, "findings": []}}'


class Recorder(ThreadingHTTPServer):
    """Answers every GET with an empty list, the first `limited` requests with a 429; records the headers in `seen`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.seen: list[dict[str, str]] = []
        self.limited = 0
        self.code = "rate_limited"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Recorder)
        self.server.seen.append(dict(self.headers))
        limited = self.server.limited > 0
        self.server.limited -= limited
        body = BUSY.replace(b"CODE", self.server.code.encode()) if limited else EMPTY
        self.send_response(429 if limited else 200)
        if limited:
            self.send_header("Retry-After", "1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with Recorder() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_request_is_retried_after_503_and_reported_once(proxy: BreakingProxy, rows: Path) -> None:
    reports: list[tuple[str, float]] = []
    with Client(proxy.url, on_drop=lambda error, patience_s: reports.append((str(error), patience_s))) as client:
        proxy.refusals = 2
        job = client.submit(SPEC, rows)
        ((message, patience_s),) = reports
        assert "HTTP 503" in message
        assert patience_s == 60.0
    with Client(proxy.url, on_drop=lambda error, patience_s: reports.append((str(error), patience_s))) as client:
        proxy.refusals = 1
        assert client.get(job.id).id == job.id
    assert len(reports) == 2


def test_retries_end_with_the_error_of_the_service(proxy: BreakingProxy) -> None:
    proxy.refusals = 100
    with Client(proxy.url, patience_s=0.3) as client, pytest.raises(ServiceError) as caught:
        client.models()
    assert caught.value.status == 503
    assert 2 <= len(proxy.brought) <= 5


def test_request_over_the_rate_limit_is_retried_after_retry_after(recorder: Recorder) -> None:
    recorder.limited = 1
    retry_after: list[float] = []
    with Client(
        recorder.url, on_drop=lambda error, _: retry_after.append(getattr(error, "retry_after_s", 0.0))
    ) as client:
        assert client.models() == []
    assert retry_after == [1.0]
    assert len(recorder.seen) == 2


def test_request_over_a_quota_is_not_retried(recorder: Recorder) -> None:
    recorder.limited, recorder.code = 1, "quota_exceeded"
    with Client(recorder.url) as client, pytest.raises(ServiceError) as caught:
        client.models()
    assert (caught.value.status, caught.value.retry_after_s) == (429, 1.0)
    assert len(recorder.seen) == 1


def test_backoff_sleeps_for_the_retry_after_of_a_rate_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    backoff = Backoff(100.0)
    backoff.pause(ServiceError(429, "rate_limited", "too fast", retry_after_s=7.0))
    backoff.pause(ServiceError(503, "unavailable", "restarting", retry_after_s=7.0))
    backoff.pause(Unreachable("away"))
    assert slept == [7.0, 0.4, 0.8]


def test_key_is_sent_as_bearer_token_and_never_shown(recorder: Recorder) -> None:
    with Client(recorder.url, api_key="sk-secret") as client:
        client.models()
        assert "secret" not in repr(client)
    with Client(recorder.url) as client:
        client.models()
    assert [headers.get("Authorization") for headers in recorder.seen] == ["Bearer sk-secret", None]


@pytest.mark.parametrize("key", ["", "sk secret", "sk-secret\n", "sk-sécret"])
def test_key_that_cannot_be_sent_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Client(api_key=key)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "is_read"),
    [("http://127.0.0.1", False), ("https://127.0.0.1", True), ("http://a.test", True), ("https://a.test", True)],
)
def test_certificate_authorities_are_read_only_if_a_certificate_can_be_presented(
    url: str, is_read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []

    def default_context(**_: Any) -> ssl.SSLContext:
        reads.append(url)
        return ssl.create_default_context()

    monkeypatch.setattr("httpcore2.default_ssl_context", default_context)
    with Client(url):
        assert bool(reads) is is_read  # also for http to another host, because a proxy may present a certificate
