"""HTTP/1.1 on one connection, with deadlines for the arrival of a request.

An application sees a request when its head is complete, and reads the body at its own pace. Only the protocol can
detect a client that sends a byte per second to occupy a connection, a scratch file or a thread.
"""

from __future__ import annotations

import asyncio
import re
import resource
from enum import Enum
from typing import Any, ClassVar

import h11
import structlog
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.server import ServerState

from api.errors import MalformedRequest, RequestTimeout, response_of
from qlora_service.errors import QLoRAError, Unavailable

MIN_BYTES_PER_S = 16 * 1024
"""Minimum average rate of a body: half of the slowest broadband upstream, 256 kbit/s. 2 GB may take 34 hours."""
MAX_CREDIT_S = 60.0
"""Maximum pause of a client that was fast before: enough for a short network outage, not for an idle connection."""
MAX_HEAD_BYTES = 32 * 1024
"""Maximum size of request line plus headers; some browsers send 16 KiB of cookies for other services of the host."""
MAX_CONNECTIONS = 4096
SPARE_FILES = 128
"""File descriptors for everything except connections: the database, uploads, downloads."""

_END_OF_HEAD = re.compile(rb"\n\r?\n")
_ABSOLUTE_FORM = re.compile(rb"https?://([^/?]*)(.*)", re.IGNORECASE)

log = structlog.get_logger("api")


class ServerConnection(h11.Connection):
    """h11's connection, with a limit on complete heads too, and with request targets in origin form.

    h11 itself limits only an incomplete head, and passes request targets on unchanged.
    """

    def __init__(self, max_head_bytes: int) -> None:
        super().__init__(h11.SERVER, max_head_bytes)
        self._max_head_bytes = max_head_bytes

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Raises: h11.RemoteProtocolError."""
        if self.their_state is h11.IDLE:
            received, _ = self.trailing_data
            end = _END_OF_HEAD.search(received)
            if end is not None and end.end() > self._max_head_bytes:
                raise h11.RemoteProtocolError("the head is too large")
        event = super().next_event()
        return _in_origin_form(event) if isinstance(event, h11.Request) else event


class Awaited(Enum):
    HEAD = "head"
    BODY = "body"


class ReceiptProtocol(H11Protocol):
    """Closes connections whose request does not arrive in time; `receipt_protocol` sets the deadline.

    A head must arrive within `receipt_s` of its first byte, or, for the first head, of the connection. A body must
    arrive within `receipt_s` plus its transfer time at MIN_BYTES_PER_S, without a pause longer than MAX_CREDIT_S.
    Between two requests, the keep-alive timeout applies.
    """

    receipt_s: ClassVar[float]
    max_connections: ClassVar[int]

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = ServerConnection(MAX_HEAD_BYTES)
        self._awaited: Awaited | None = None
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._has_received = False
        self._was_blocked = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._respond_and_close(
                Unavailable(f"{self.max_connections} connections are open, which is the maximum: try again later")
            )
        else:
            self._await(Awaited.HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        self._await(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._has_received = True
        if self._awaited is Awaited.BODY:
            transfer_s = len(data) / MIN_BYTES_PER_S
            self._deadline = min(self._deadline + transfer_s, self.loop.time() + self._max_credit_s)
        super().data_received(data)

    def handle_events(self) -> None:
        """Handles received data; also called after a response, for a pipelined request that arrived before it."""
        super().handle_events()
        if not self.transport.is_closing():
            self._await(self._incomplete())

    def send_400_response(self, msg: str) -> None:
        """Responds in the same JSON shape as every other error."""
        self._respond_and_close(
            MalformedRequest(f"this is not HTTP/1.1, or its head is larger than {MAX_HEAD_BYTES} bytes")
        )

    @property
    def _max_credit_s(self) -> float:
        return max(MAX_CREDIT_S, self.receipt_s)

    def _incomplete(self) -> Awaited | None:
        """The part of a request that the client has begun but not finished; None between two requests."""
        if self.conn.their_state is h11.SEND_BODY:
            return Awaited.BODY
        received, _ = self.conn.trailing_data if self.conn.their_state is h11.IDLE else (b"", False)
        return Awaited.HEAD if received else None

    def _await(self, awaited: Awaited | None) -> None:
        """Starts the deadline for a part of the request; with None, stops it."""
        if awaited is self._awaited:
            return
        self._awaited = awaited
        self._was_blocked = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if awaited is not None:
            self._deadline = self.loop.time() + self.receipt_s
            self._timer = self.loop.call_at(self._deadline, self._check_deadline)

    def _check_deadline(self) -> None:
        """Times out a late client; data received since the timer was set may have extended the deadline."""
        now = self.loop.time()
        is_blocked = self._awaited is Awaited.BODY and (self.flow.read_paused or self.cycle.waiting_for_100_continue)
        if is_blocked or self._was_blocked:
            # The client waits for the application, or did until recently: it gets the full time from now on.
            self._deadline = max(self._deadline, now + self.receipt_s)
        self._was_blocked = is_blocked
        if now < self._deadline:
            self._timer = self.loop.call_at(self._deadline, self._check_deadline)
        else:
            self._time_out()

    def _time_out(self) -> None:
        assert self._awaited is not None
        awaited = self._awaited
        log.info("request_too_slow", awaited=awaited.value, client=self.client and self.client[0])
        if not self._has_received:
            # Without a response: browsers open connections in advance and would read it as the response to a later
            # request.
            self.transport.close()
        elif awaited is Awaited.BODY and self.cycle.response_started:
            # Not `close`, which would first send the rest of the response to a client that may read slowly too.
            self.transport.abort()
        else:
            self._respond_and_close(
                RequestTimeout(
                    f"the request's {awaited.value} did not arrive in time: it has {self.receipt_s:g} s, and after "
                    f"that a body must arrive at {MIN_BYTES_PER_S} bytes per second or more: send the request again",
                )
            )

    def _respond_and_close(self, error: QLoRAError) -> None:
        """Responds in place of the application, and closes the connection."""
        awaited = self._awaited
        self._await(None)
        response = response_of(error)
        headers = [*response.raw_headers, CLOSE_HEADER]
        status = response.status_code
        events: list[h11.Event] = [h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])]
        if not (awaited is Awaited.BODY and self.scope["method"] == "HEAD"):
            events.append(h11.Data(data=bytes(response.body)))
        for event in (*events, h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        if awaited is Awaited.BODY:
            # The application still runs; its next read of the body raises ClientDisconnect.
            self.cycle.disconnected = True
        self.transport.close()


def receipt_protocol(receipt_s: float) -> type[ReceiptProtocol]:
    """The protocol class with a deadline of `receipt_s` seconds for a head and for the first bytes of a body."""
    limits = {"receipt_s": receipt_s, "max_connections": _max_connections()}
    return type("BoundReceiptProtocol", (ReceiptProtocol,), limits)


def _in_origin_form(request: h11.Request) -> h11.Request:
    """The request with a target in origin form.

    The host of an absolute target, http://host/path, replaces the Host header (RFC 9112, section 3.2.2).
    """
    absolute = _ABSOLUTE_FORM.fullmatch(request.target)
    if absolute is None:
        return request
    authority, path = absolute.groups()
    headers = [(name, value) for name, value in request.headers if name != b"host"]
    return h11.Request(
        method=request.method,
        target=path if path.startswith(b"/") else b"/" + path,
        headers=[(b"host", authority), *headers],
        http_version=request.http_version,
    )


def _max_connections() -> int:
    """Maximum number of connections, after raising the process's limit of open files as far as they need."""
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = MAX_CONNECTIONS + SPARE_FILES
    if soft_limit != resource.RLIM_INFINITY and soft_limit < needed:
        soft_limit = needed if hard_limit == resource.RLIM_INFINITY else min(needed, hard_limit)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft_limit, hard_limit))
    return MAX_CONNECTIONS if soft_limit == resource.RLIM_INFINITY else max(1, min(needed, soft_limit) - SPARE_FILES)
