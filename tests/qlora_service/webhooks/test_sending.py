"""Sending over real sockets."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qlora_service.errors import InvalidRequest
from qlora_service.webhooks.sending import Sender
from tests.receiver import Receiver, receiving

BODY = b'{"id":"evt_1"}'
HEADERS = {"webhook-id": "evt_1"}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@contextmanager
def responding(respond: Callable[[socket.socket], None]) -> Iterator[int]:
    """The port of a server that calls `respond` with one connection, after reading from it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                respond(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


def send(url: str, sender: Sender) -> int:
    return sender.send(url, HEADERS, BODY)


@pytest.mark.parametrize("status", [200, 204, 301, 404, 410, 500, 503])
def test_status_of_the_response_is_returned(receiver: Receiver, status: int) -> None:
    receiver.answers = [status]
    assert send(receiver.url("/a?b=c"), Sender(private=True)) == status
    (received,) = receiver.received
    assert (received.path, received.body) == ("/a?b=c", BODY)
    assert received.headers["webhook-id"] == "evt_1"
    assert received.headers["content-type"] == "application/json"
    assert received.headers["host"] == f"127.0.0.1:{receiver.port}"


def test_redirects_are_not_followed(receiver: Receiver) -> None:
    receiver.answers, receiver.location = [302], receiver.url("/elsewhere")
    assert send(receiver.url(), Sender(private=True)) == 302
    assert len(receiver.received) == 1


def test_host_that_resolves_differently_the_second_time_is_refused_without_a_request(receiver: Receiver) -> None:
    resolved = [["93.184.215.14"], ["127.0.0.1"]]
    sender = Sender(resolve=lambda *_: resolved.pop(0))
    url = f"https://receiver.example:{receiver.port}/"
    sender.check(url)
    with pytest.raises(InvalidRequest, match="not on the public internet"):
        send(url, sender)
    assert receiver.received == []


def test_connection_goes_to_the_vetted_address(receiver: Receiver) -> None:
    # The host has no real address: a second lookup by the system would fail.
    lookups: list[str] = []

    def resolve(host: str, port: int) -> list[str]:
        lookups.append(host)
        return ["127.0.0.1"]

    assert send(f"http://receiver.invalid:{receiver.port}/", Sender(private=True, resolve=resolve)) == 200
    assert lookups == ["receiver.invalid"]
    assert receiver.received[0].headers["host"] == f"receiver.invalid:{receiver.port}"


def test_next_address_is_used_if_one_does_not_connect(receiver: Receiver) -> None:
    sender = Sender(private=True, resolve=lambda *_: ["127.0.0.2", "127.0.0.1"])
    assert send(f"http://receiver.invalid:{receiver.port}/", sender) == 200


def test_closed_port_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(InvalidRequest, match=f"127.0.0.1:{port} did not accept the message: Connection refused"):
        send(f"http://127.0.0.1:{port}/", Sender(private=True))


def test_slow_response_has_a_deadline() -> None:
    def drip(connection: socket.socket) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100:
            try:
                connection.sendall(bytes([byte]))
            except OSError:
                return
            time.sleep(0.05)

    with responding(drip) as port:
        started = time.monotonic()
        with pytest.raises(InvalidRequest, match=r"no response within 0\.4 s"):
            send(f"http://127.0.0.1:{port}/", Sender(private=True, timeout_s=0.4))
        assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (b"", "not valid HTTP"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "not valid HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: " + b"a" * 100_000, "not valid HTTP"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 5000, "not valid HTTP"),
    ],
)
def test_invalid_response_is_refused(response: bytes, reason: str) -> None:
    def reply(connection: socket.socket) -> None:
        try:
            connection.sendall(response)
        except OSError:
            return

    with responding(reply) as port, pytest.raises(InvalidRequest, match=reason):
        send(f"http://127.0.0.1:{port}/", Sender(private=True))


def test_endless_response_is_read_to_a_limit() -> None:
    written = 0

    def flood(connection: socket.socket) -> None:
        nonlocal written
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while written < 50_000_000:
                written += connection.send(b"a" * 10_000)
        except OSError:
            return

    with responding(flood) as port:
        assert send(f"http://127.0.0.1:{port}/", Sender(private=True)) == 200
    assert written < 20_000_000


@pytest.mark.slow
def test_certificate_must_match_the_host_name(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", key, "-out", certificate, "-subj", "/CN=test", "-addext", "subjectAltName=DNS:receiver.example"],
        check=True, capture_output=True,
    )  # fmt: skip
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    trusted = ssl.create_default_context(cafile=str(certificate))
    with receiving(server) as receiver:

        def sender(tls: ssl.SSLContext | None) -> Sender:
            return Sender(private=True, resolve=lambda *_: ["127.0.0.1"], tls=tls)

        assert send(f"https://receiver.example:{receiver.port}/", sender(trusted)) == 200
        with pytest.raises(InvalidRequest, match="certificate is not accepted: Hostname mismatch"):
            send(f"https://other.example:{receiver.port}/", sender(trusted))
        with pytest.raises(InvalidRequest, match="certificate is not accepted: self-signed"):
            send(f"https://receiver.example:{receiver.port}/", sender(None))
        assert len(receiver.received) == 1
