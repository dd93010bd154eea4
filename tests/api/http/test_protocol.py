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
"""Seconds after which the last slow client must be disconnected; the margin is for a busy machine."""
HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an API process with a short deadline."""
    prelude = f"import os; os.environ['QLORA_RECEIPT_S'] = '{RECEIPT_S}'"
    with RunningApi(tmp_path_factory.mktemp("slow"), prelude) as api:
        yield api.port


class SlowClient:
    """A client that sends `first` at once, then ten bytes of `rest` per second; records the response and its end."""

    def __init__(self, port: int, first: bytes, rest: bytes = b"") -> None:
        self.response, self.closed_after_s = b"", float("inf")
        self._port, self._first, self._rest = port, first, rest
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def join(self) -> SlowClient:
        """Waits until the connection is closed."""
        self._thread.join()
        return self

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    @property
    def status(self) -> int:
        return int(self.response.split(b" ")[1])

    @property
    def error(self) -> dict[str, object]:
        error: dict[str, object] = json.loads(self.response.partition(b"\r\n\r\n")[2])["error"]
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
                self.response += received


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
    """One client per case, run at the same time to save time."""
    return {name: SlowClient(port, *sent) for name, sent in (HEADS | BODIES | {"silence": (b"", b"")}).items()}


def test_connection_without_a_request_is_closed_without_a_response(slow_clients: dict[str, SlowClient]) -> None:
    client = slow_clients["silence"].join()
    assert RECEIPT_S * 0.9 < client.closed_after_s < LATE_S
    assert client.response == b""


@pytest.mark.parametrize("name", HEADS)
def test_slow_head_is_answered_408_and_the_connection_closed(slow_clients: dict[str, SlowClient], name: str) -> None:
    client = slow_clients[name].join()
    assert RECEIPT_S * 0.9 < client.closed_after_s < LATE_S
    assert b"HTTP/1.1 408" in client.response
    assert b"connection: close" in client.response.lower()


@pytest.mark.parametrize("name", sorted(BODIES.keys() - {"of a HEAD"}))
def test_slow_body_is_answered_408_and_the_connection_closed(slow_clients: dict[str, SlowClient], name: str) -> None:
    client = slow_clients[name].join()
    assert RECEIPT_S * 0.9 < client.closed_after_s < LATE_S
    assert client.status == 408
    assert client.error["code"] == "request_timeout"
    assert "body did not arrive in time" in str(client.error["message"])


def test_response_to_a_slow_request_of_method_head_has_no_body(slow_clients: dict[str, SlowClient]) -> None:
    client = slow_clients["of a HEAD"].join()
    assert client.response.endswith(b"\r\n\r\n")
    assert client.status in (405, 408)


def test_connection_is_closed_if_a_slow_body_continues_after_the_response(port: int) -> None:
    first = POST.replace(b"application/json", b"text/plain") + b"Content-Length: 1000\r\n\r\n"
    client = SlowClient(port, first, b"x" * 1000).join()
    assert client.closed_after_s < LATE_S
    assert client.status == 415
    assert b" 408 " not in client.response


def test_body_above_the_minimum_rate_is_received_completely(port: int) -> None:
    """The body takes longer than the deadline of a client below the minimum rate."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        # The first 164 kB give the client enough credit to survive a stall of this machine.
        connection.sendall(POST + b"Content-Length: 204000\r\n\r\n" + b" " * 164_000)
        started = time.monotonic()
        for _ in range(20):
            connection.sendall(b" " * 2000)
            time.sleep(0.08)  # 25 kB/s
        assert time.monotonic() - started > 1.5 * RECEIPT_S
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_idle_connection_between_two_requests_stays_open(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        for _ in range(2):
            connection.sendall(HEAD + b"\r\n")
            time.sleep(RECEIPT_S + 0.3)
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")


def test_responses_on_a_kept_connection_do_not_wait_for_acknowledgements(port: int) -> None:
    times = []
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        for _ in range(15):
            started = time.monotonic()
            http.get("/healthz")
            times.append(time.monotonic() - started)
    # Linux delays an acknowledgement by 40 ms if there is no data to send with it.
    assert sorted(times)[7] < 0.03


def test_other_clients_are_served_while_many_are_slow(port: int) -> None:
    kinds = [b"", b"G", POST + b"Content-Length: 1000\r\n\r\n"]
    slow = [SlowClient(port, kinds[number % 3], b"x" * 100) for number in range(60)]
    times = []
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        while any(client.is_running for client in slow):
            started = time.monotonic()
            assert http.get("/jobs").status_code == 200
            times.append(time.monotonic() - started)
            time.sleep(0.02)
    assert max(client.join().closed_after_s for client in slow) < LATE_S
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
def test_malformed_request_is_answered_400_in_the_common_shape(port: int, sent: bytes) -> None:
    client = SlowClient(port, sent).join()
    assert client.status == 400
    assert client.error["code"] == "malformed_request"


def test_size_limit_applies_to_the_second_head_in_a_packet(port: int) -> None:
    client = SlowClient(port, HEAD + b"\r\n" + HEAD + b"X-Long: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n").join()
    assert client.response.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 400" in client.response


def test_head_of_exactly_the_size_limit_is_accepted(port: int) -> None:
    rest = b"Connection: close\r\nX-Long: "
    head = HEAD + rest + b"x" * (MAX_HEAD_BYTES - len(HEAD + rest) - 4) + b"\r\n\r\n"
    assert len(head) == MAX_HEAD_BYTES
    assert SlowClient(port, head).join().status == 200


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
def test_host_of_an_absolute_target_overrides_the_host_header(
    port: int, target: bytes, host: bytes, status: int
) -> None:
    head = b"GET " + target + b" HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n"
    assert SlowClient(port, head).join().status == status


@contextmanager
def serving(delay_s: float, receipt_s: float, connections: int = 100) -> Iterator[int]:
    """The port of an application that waits `delay_s` before it reads the body."""

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


def test_time_that_a_client_waits_for_the_application_does_not_count() -> None:
    with serving(delay_s=1.5, receipt_s=1) as port:
        assert httpx2.post(f"http://127.0.0.1:{port}", content=b"x" * 10**6).text == "1000000 bytes"
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(POST + b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
            # The client has the full time from now on.
            time.sleep(0.7)
            connection.sendall(b"abc")
            assert b"200 OK" in connection.recv(1000)


def test_fast_start_does_not_allow_a_long_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.http.protocol.MAX_CREDIT_S", 0.2)
    with serving(delay_s=0, receipt_s=1) as port:
        client = SlowClient(port, POST + b"Content-Length: 9000000\r\n\r\n" + b"x" * 20 * MIN_BYTES_PER_S).join()
    assert client.closed_after_s < LATE_S
    assert client.status == 408


def test_connection_over_the_maximum_is_answered_503() -> None:
    with serving(delay_s=0, receipt_s=5, connections=2) as port:
        with ExitStack() as held:
            for _ in range(2):
                held.enter_context(socket.create_connection(("127.0.0.1", port))).sendall(HEAD)
            client = SlowClient(port, b"").join()
            assert client.status == 503
            assert b"retry-after" in client.response.lower()
        assert httpx2.get(f"http://127.0.0.1:{port}").status_code == 200
