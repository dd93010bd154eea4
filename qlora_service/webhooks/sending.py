"""One message to one URL: a POST to an address that was vetted, which follows nothing and reads next to nothing."""

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
"""For everything from the connection to the end of the answer, however slowly that comes."""
MAX_ANSWER_BYTES = 64 * 1024
"""Read so that the receiver can say what it wants to; none of it but the status is looked at."""


class Sender:
    """Sends to URLs that may be asked; safe to share between threads."""

    def __init__(
        self,
        *,
        private: bool = False,
        resolve: Resolve = system_addresses,
        tls: ssl.SSLContext | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`private` allows http, and addresses that are not on the internet; `tls` says whose certificates count."""
        self._private = private
        self._resolve = resolve
        self._tls = tls or ssl.create_default_context()
        self._timeout_s = timeout_s

    def check(self, url: str) -> None:
        """Returns when the URL may be asked, as far as is known without asking. Raises: InvalidRequest."""
        vetted_addresses(parse_target(url, private=self._private), self._resolve, private=self._private)

    def send(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        """The status with which the URL answered a POST of `body`.

        Raises:
            InvalidRequest: it may not be asked, or did not answer, and why.
        """
        target = parse_target(url, private=self._private)
        addresses = vetted_addresses(target, self._resolve, private=self._private)
        deadline = time.monotonic() + self._timeout_s
        try:
            with self._connect(target, addresses, deadline) as connection:
                return _exchange(connection, _request(target, headers, body), deadline)
        except TimeoutError:
            raise _unanswered(target, f"no answer within {self._timeout_s:g} s") from None
        except ssl.SSLCertVerificationError as error:
            raise _unanswered(target, f"its certificate is not accepted: {error.verify_message}") from None
        except OSError as error:
            raise _unanswered(target, error.strerror or type(error).__name__) from None
        except h11.RemoteProtocolError:
            raise _unanswered(target, "what it answered is no HTTP") from None

    def _connect(self, target: Target, addresses: list[str], deadline: float) -> socket.socket:
        """A connection to the first address that takes one, by TLS if the URL says so. Raises: OSError."""
        for number, address in enumerate(addresses, start=1):
            try:
                connection = socket.create_connection((address, target.port), _left(deadline))
                break
            except OSError:
                if number == len(addresses):
                    raise
        if target.scheme == "http":
            return connection
        with closing(connection):  # which is left without a socket by then, unless the handshake fails
            connection.settimeout(_left(deadline))
            # The certificate has to be the name's, whatever address it led to.
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
    """The answer's status. Raises: OSError, h11.RemoteProtocolError."""
    http = h11.Connection(h11.CLIENT)
    connection.settimeout(_left(deadline))
    connection.sendall(b"".join(http.send(event) or b"" for event in request))
    received, status = 0, None
    while received <= MAX_ANSWER_BYTES:
        try:
            event = http.next_event()
            if event is h11.NEED_DATA:
                connection.settimeout(_left(deadline))
                packet = connection.recv(4096)
                received += len(packet)
                http.receive_data(packet)
        except (OSError, h11.RemoteProtocolError):
            if status is None:
                raise
            return status  # it broke off in what is of no interest
        if isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.EndOfMessage):
            break
    if status is None:
        raise h11.RemoteProtocolError("the answer's head has no end")
    return status


def _left(deadline: float) -> float:
    """Seconds until the deadline. Raises: TimeoutError."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _unanswered(target: Target, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{target.authority} did not take the message: {reason}", location="/url")
