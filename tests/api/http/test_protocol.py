from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx2
import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from api.http.protocol import MAX_HEAD_BYTES, MIN_BYTES_PER_S, receipt_protocol
from tests.running_api import RunningApi

RECEIPT_S = 0.8
LATE_S = RECEIPT_S + 1.5
"""When the last slow client is gone; the machine may be busy."""
HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of an API process with a short deadline."""
    prelude = f"import os; os.environ['QLORA_RECEIPT_S'] = '{RECEIPT_S}'"
    with RunningApi(tmp_path_factory.mktemp("slow"), prelude) as api:
        yield api.port


class SlowClient:
    """Sends `first` at once and then a byte of `rest` ten times a second; what it was answered, and when it was cut."""

    def __init__(self, port: int, first: bytes, rest: bytes = b"") -> None:
        self.answer, self.closed_after_s = b"", float("inf")
        self._port, self._first, self._rest = port, first, rest
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> SlowClient:
        self._thread.join()
        return self

    @property
    def runs(self) -> bool:
        return self._thread.is_alive()

    @property
    def status(self) -> int:
        return int(self.answer.split(b" ")[1])

    @property
    def error(self) -> dict[str, object]:
        error: dict[str, object] = json.loads(self.answer.partition(b"\r\n\r\n")[2])["error"]
        return error

    def _run(self) -> None:
        started = time.monotonic()
        with socket.create_connection(("127.0.0.1", self._port), timeout=0.1) as connection:
            connection.sendall(self._first)
            position = 0
            while time.monotonic() < started + 3 * LATE_S:
                try:
                    connection.sendall(self._rest[position : position + 1])
                    position += 1
                    received = connection.recv(65536)
                except TimeoutError:
                    continue
                except OSError:
                    received = b""
                if not received:
                    self.closed_after_s = time.monotonic() - started
                    return
                self.answer += received


HEADS = {
    "request line": (b"G", b"ET / HTTP/1.1\r\n" * 100),
    "headers": (HEAD, b"X-Slow: yes\r\n" * 100),
    "second request": (HEAD + b"\r\n" + HEAD, b"X-Second: yes\r\n" * 100),
}
BODIES = {
    "bytes": (POST + b"Content-Length: 1000\r\n\r\n", b"{" + b" " * 999),
    "nothing": (POST + b"Content-Length: 1000\r\n\r\n", b""),
    "chunks": (CHUNKED, b"1\r\n \r\n" * 100),
    "a chunk's extension": (CHUNKED, b"1;" + b"x" * 1000),
    "of a HEAD": (b"HEAD /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n", b""),
}


@pytest.fixture(scope="module")
def slow_clients(port: int) -> dict[str, SlowClient]:
    """All at once, to save time."""
    return {name: SlowClient(port, *sent) for name, sent in (HEADS | BODIES | {"silence": (b"", b"")}).items()}


def test_connection_without_a_request_is_closed_without_an_answer(slow_clients: dict[str, SlowClient]) -> None:
    client = slow_clients["silence"].end()
    assert RECEIPT_S * 0.9 < client.closed_after_s < LATE_S
    assert client.answer == b""


@pytest.mark.parametrize("name", HEADS)
def test_head_that_trickles_in_is_answered_408_and_closed(slow_clients: dict[str, SlowClient], name: str) -> None:
    client = slow_clients[name].end()
    assert RECEIPT_S * 0.9 < client.closed_after_s < LATE_S
    assert b"HTTP/1.1 408" in client.answer
    assert b"connection: close" in client.answer.lower()


@pytest.mark.parametrize("name", sorted(BODIES.keys() - {"of a HEAD"}))
def test_body_that_trickles_in_is_answered_408_and_closed(slow_clients: dict[str, SlowClient], name: str) -> None:
    client = slow_clients[name].end()
    assert RECEIPT_S * 0.9 < client.closed_after_s < LATE_S
    assert client.status == 408
    assert client.error["code"] == "request_timeout"
    assert "body did not arrive in time" in str(client.error["message"])


def test_answer_to_a_slow_head_request_has_no_body(slow_clients: dict[str, SlowClient]) -> None:
    client = slow_clients["of a HEAD"].end()
    assert client.answer.endswith(b"\r\n\r\n")
    assert client.status in (405, 408)


def test_body_that_trickles_on_after_the_answer_is_cut_off(port: int) -> None:
    first = POST.replace(b"application/json", b"text/plain") + b"Content-Length: 1000\r\n\r\n"
    client = SlowClient(port, first, b"x" * 1000).end()
    assert client.closed_after_s < LATE_S
    assert client.status == 415
    assert b" 408 " not in client.answer


def test_slow_body_above_the_least_rate_is_received_whole(port: int) -> None:
    """For longer than the deadline of a client that sends less."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        # What it sends first keeps it from being late when this machine stands still.
        connection.sendall(POST + b"Content-Length: 204000\r\n\r\n" + b" " * 164_000)
        started = time.monotonic()
        for _ in range(20):
            connection.sendall(b" " * 2000)
            time.sleep(0.08)  # 25 kB/s
        assert time.monotonic() - started > 1.5 * RECEIPT_S
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_connection_between_two_requests_is_left_alone(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        for _ in range(2):
            connection.sendall(HEAD + b"\r\n")
            time.sleep(RECEIPT_S + 0.3)
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")


def test_answers_on_a_kept_connection_do_not_wait_for_acknowledgements(port: int) -> None:
    times = []
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        for _ in range(15):
            started = time.monotonic()
            http.get("/healthz")
            times.append(time.monotonic() - started)
    # Linux acknowledges after 40 ms when there is nothing to say.
    assert sorted(times)[7] < 0.03


def test_others_are_served_while_many_are_slow(port: int) -> None:
    kinds = [b"", b"G", POST + b"Content-Length: 1000\r\n\r\n"]
    slow = [SlowClient(port, kinds[number % 3], b"x" * 100) for number in range(60)]
    times = []
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        while any(client.runs for client in slow):
            started = time.monotonic()
            assert http.get("/jobs").status_code == 200
            times.append(time.monotonic() - started)
            time.sleep(0.02)
    assert max(client.end().closed_after_s for client in slow) < LATE_S
    assert sorted(times)[len(times) // 2] < 0.1


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
        HEAD + b"X-Long: " + b"x" * 2 * MAX_HEAD_BYTES,
        HEAD + b"X-Long: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n",
    ],
    ids=["TLS", "long head", "long head that ends"],
)
def test_what_is_no_request_is_answered_in_the_one_shape(port: int, sent: bytes) -> None:
    client = SlowClient(port, sent).end()
    assert client.status == 400
    assert client.error["code"] == "malformed_request"


def test_second_head_of_a_packet_is_measured_too(port: int) -> None:
    client = SlowClient(port, HEAD + b"\r\n" + HEAD + b"X-Long: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n").end()
    assert client.answer.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 400" in client.answer


def test_head_of_just_the_limit_is_answered(port: int) -> None:
    rest = b"Connection: close\r\nX-Long: "
    head = HEAD + rest + b"x" * (MAX_HEAD_BYTES - len(HEAD + rest) - 4) + b"\r\n\r\n"
    assert len(head) == MAX_HEAD_BYTES
    assert SlowClient(port, head).end().status == 200


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        (b"http://localhost/healthz", b"elsewhere.example", 200),
        (b"HTTP://LocalHost:8080/jobs?limit=1", b"elsewhere.example", 200),
        (b"http://elsewhere.example/jobs", b"localhost", 403),
        (b"http://localhost", b"localhost", 404),
        (b"http://localhost?limit=1", b"localhost", 404),
        (b"http://user@localhost/jobs", b"localhost", 403),
        (b"/http://localhost/jobs", b"localhost", 404),
        (b"*", b"localhost", 404),
    ],
)
def test_target_may_name_the_host_which_then_counts(port: int, target: bytes, host: bytes, status: int) -> None:
    head = b"GET " + target + b" HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n"
    assert SlowClient(port, head).end().status == status


@contextmanager
def serving(delay_s: float, receipt_s: float, connections: int = 100) -> Iterator[int]:
    """An application that waits before it reads, behind the protocol; its port."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(delay_s)
        body = await Request(scope, receive).body()
        await PlainTextResponse(f"{len(body)} bytes")(scope, receive, send)

    protocol = receipt_protocol(receipt_s)
    protocol.max_connections = connections
    server = uvicorn.Server(uvicorn.Config(app, http=protocol, ws="none", lifespan="off", log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def test_client_that_waits_for_the_application_is_not_late() -> None:
    with serving(delay_s=1.5, receipt_s=1) as port:
        assert httpx2.post(f"http://127.0.0.1:{port}", content=b"x" * 10**6).text == "1000000 bytes"
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(POST + b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
            # It has the whole time from now on.
            time.sleep(0.7)
            connection.sendall(b"abc")
            assert b"200 OK" in connection.recv(1000)


def test_fast_start_buys_no_long_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.http.protocol.MAX_CREDIT_S", 0.2)
    with serving(delay_s=0, receipt_s=1) as port:
        client = SlowClient(port, POST + b"Content-Length: 9000000\r\n\r\n" + b"x" * 20 * MIN_BYTES_PER_S).end()
    assert client.closed_after_s < LATE_S
    assert client.status == 408


def test_one_connection_too_many_is_answered_503() -> None:
    with serving(delay_s=0, receipt_s=5, connections=2) as port:
        with ExitStack() as held:
            for _ in range(2):
                held.enter_context(socket.create_connection(("127.0.0.1", port))).sendall(HEAD)
            client = SlowClient(port, b"").end()
            assert client.status == 503
            assert b"retry-after" in client.answer.lower()
        assert httpx2.get(f"http://127.0.0.1:{port}").status_code == 200
