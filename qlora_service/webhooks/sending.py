"""Sending of one message: a POST to a vetted address that follows no redirects and reads a bounded response."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Mapping
from contextlib import closing
from importlib.metadata import version

import h11

from qlora_service.errors import InvalidRequest
from qlora_service.webhooks.targets import Resolve, Target, parse_target, system_addresses, vetted_addresses

TIMEOUT_S = 10.0
"""Deadline for the whole exchange, from connecting to the end of the response"""
MAX_RESPONSE_BYTES = 64 * 1024
"""The response is read up to this size, so that the receiver can finish sending; only the status is used."""


class Sender:
    """Sends messages to allowed URLs; safe to share between threads."""

    def __init__(
        self,
        *,
        private: bool = False,
        resolve: Resolve = system_addresses,
        tls: ssl.SSLContext | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`private` allows http and addresses outside the public internet; `tls` sets the trusted certificates."""
        self._private = private
        self._resolve = resolve
        self._tls = tls or ssl.create_default_context()
        self._timeout_s = timeout_s

    def check(self, url: str) -> None:
        """Validates the URL and its addresses without connecting. Raises: InvalidRequest."""
        vetted_addresses(parse_target(url, private=self._private), self._resolve, private=self._private)

    def send(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        """The HTTP status of the response to a POST of `body`.

        Raises:
            InvalidRequest: the URL is not allowed, or did not respond, with the reason.
        """
        target = parse_target(url, private=self._private)
        addresses = vetted_addresses(target, self._resolve, private=self._private)
        deadline = time.monotonic() + self._timeout_s
        try:
            with self._connect(target, addresses, deadline) as connection:
                return _exchange(connection, _request(target, headers, body), deadline)
        except TimeoutError:
            raise _no_response(target, f"no response within {self._timeout_s:g} s") from None
        except ssl.SSLCertVerificationError as error:
            raise _no_response(target, f"its certificate is not accepted: {error.verify_message}") from None
        except OSError as error:
            raise _no_response(target, error.strerror or type(error).__name__) from None
        except h11.RemoteProtocolError:
            raise _no_response(target, "its response is not valid HTTP") from None

    def _connect(self, target: Target, addresses: list[str], deadline: float) -> socket.socket:
        """A connection to the first address that accepts one, over TLS for an https URL. Raises: OSError."""
        for number, address in enumerate(addresses, start=1):
            try:
                connection = socket.create_connection((address, target.port), _remaining_s(deadline))
                break
            except OSError:
                if number == len(addresses):
                    raise
        if target.scheme == "http":
            return connection
        with closing(connection):  # detached by a successful handshake, so this closes it only after a failed one
            connection.settimeout(_remaining_s(deadline))
            # The certificate must match the host name, not the address.
            return self._tls.wrap_socket(connection, server_hostname=target.host)


def _request(target: Target, headers: Mapping[str, str], body: bytes) -> list[h11.Event]:
    fields = {
        "Host": target.authority,
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "User-Agent": f"qlora-service/{version('qlora-service')}",
        "Connection": "close",
        **headers,
    }
    return [
        h11.Request(method="POST", target=target.path, headers=list(fields.items())),
        h11.Data(data=body),
        h11.EndOfMessage(),
    ]


def _exchange(connection: socket.socket, request: list[h11.Event], deadline: float) -> int:
    """The status of the response. Raises: OSError, h11.RemoteProtocolError."""
    http = h11.Connection(h11.CLIENT)
    connection.settimeout(_remaining_s(deadline))
    connection.sendall(b"".join(http.send(event) or b"" for event in request))
    received, status = 0, None
    while received <= MAX_RESPONSE_BYTES:
        try:
            event = http.next_event()
            if event is h11.NEED_DATA:
                connection.settimeout(_remaining_s(deadline))
                packet = connection.recv(4096)
                received += len(packet)
                http.receive_data(packet)
        except (OSError, h11.RemoteProtocolError):
            if status is None:
                raise
            return status  # the response broke off after its head, which is all that is needed
        if isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.EndOfMessage):
            break
    if status is None:
        raise h11.RemoteProtocolError("the response has no complete head")
    return status


def _remaining_s(deadline: float) -> float:
    """Seconds until the deadline. Raises: TimeoutError."""
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError
    return remaining_s


def _no_response(target: Target, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{target.authority} did not accept the message: {reason}", location="/url")
