"""HTTP/1.1 on a connection, with a bound on how long a client may take to say what it wants.

Applications see a request once its head is complete, and read its body at leisure: only here can a client be told
apart that sends a byte a second to hold a connection, a scratch file or a thread.
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

from api.errors import MalformedRequest, RequestTimeout, refusal
from qlora_service.errors import QLoRAError, Unavailable

MIN_BYTES_PER_S = 16 * 1024
"""Of a body, on average: half of the slowest upstream sold as broadband, 256 kbit/s. So 2 GB may take 34 hours."""
MAX_CREDIT_S = 60.0
"""The longest silence of a client that sent fast before: a line that drops out for a moment, not an idle connection."""
MAX_HEAD_BYTES = 32 * 1024
"""Of request line and headers, all in all; some browsers send 16 KiB of cookies for other services of the host."""
MAX_CONNECTIONS = 4096
SPARE_FILES = 128
"""File descriptors for everything but connections: the database, uploads, downloads."""

_END_OF_HEAD = re.compile(rb"\n\r?\n")
_ABSOLUTE = re.compile(rb"https?://([^/?]*)(.*)", re.IGNORECASE)

log = structlog.get_logger("api")


class ServerConnection(h11.Connection):
    """HTTP/1.1 as h11 reads it, but no head above `max_head_bytes`, and targets as applications expect them.

    h11 by itself bounds only a head that has yet to end, and leaves it to its callers what a target is.
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


def _in_origin_form(request: h11.Request) -> h11.Request:
    """The request; the host of a target such as http://host/path stands in its Host header, as RFC 9112, 3.2.2 says."""
    absolute = _ABSOLUTE.fullmatch(request.target)
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


class Awaited(Enum):
    HEAD = "head"
    BODY = "body"


class ReceiptProtocol(H11Protocol):
    """Closes connections whose request does not arrive in time; `receipt_protocol` sets the time.

    A head has `receipt_s` from its first byte, the first one from when the connection was accepted. A body has
    `receipt_s` and what it takes at MIN_BYTES_PER_S, but never more than MAX_CREDIT_S without a byte. Connections
    between two requests are the keep-alive timeout's business.
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
        self._due = 0.0
        self._alarm: asyncio.TimerHandle | None = None
        self._heard = False
        self._was_held_up = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._refuse(Unavailable(f"{self.max_connections} connections are open, which is as many as may be"))
        else:
            self._expect(Awaited.HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._heard = True
        if self._awaited is Awaited.BODY:
            self._due = min(self._due + len(data) / MIN_BYTES_PER_S, self.loop.time() + self._max_credit_s)
        super().data_received(data)

    def handle_events(self) -> None:
        """Also called for what was sent ahead, when the request before it was answered."""
        super().handle_events()
        if not self.transport.is_closing():
            self._expect(self._missing())

    def send_400_response(self, msg: str) -> None:
        """In the shape of every other error."""
        self._refuse(MalformedRequest(f"this is no HTTP/1.1, or its head is larger than {MAX_HEAD_BYTES} bytes"))

    @property
    def _max_credit_s(self) -> float:
        return max(MAX_CREDIT_S, self.receipt_s)

    def _missing(self) -> Awaited | None:
        """What the client has begun and not finished."""
        if self.conn.their_state is h11.SEND_BODY:
            return Awaited.BODY
        begun, _ = self.conn.trailing_data if self.conn.their_state is h11.IDLE else (b"", False)
        return Awaited.HEAD if begun else None

    def _expect(self, awaited: Awaited | None) -> None:
        if awaited is self._awaited:
            return
        self._awaited = awaited
        self._was_held_up = False
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if awaited is not None:
            self._due = self.loop.time() + self.receipt_s
            self._alarm = self.loop.call_at(self._due, self._look)

    def _look(self) -> None:
        """Gives up a client that is late; what arrived since the alarm was set may have put that off."""
        now = self.loop.time()
        is_held_up = self._awaited is Awaited.BODY and (self.flow.read_paused or self.cycle.waiting_for_100_continue)
        if is_held_up or self._was_held_up:
            # It waits for the application, or did a moment ago: it has the whole time from then on.
            self._due = max(self._due, now + self.receipt_s)
        self._was_held_up = is_held_up
        if now < self._due:
            self._alarm = self.loop.call_at(self._due, self._look)
        else:
            self._give_up()

    def _give_up(self) -> None:
        assert self._awaited is not None
        what = self._awaited
        log.info("request_too_slow", awaited=what.value, client=self.client and self.client[0])
        if not self._heard:
            # Browsers connect ahead, and would take this for the answer to a request yet to come.
            self.transport.close()
        elif what is Awaited.BODY and self.cycle.response_started:
            # What is left of the answer may wait for a client that reads as slowly as it sends.
            self.transport.abort()
        else:
            self._refuse(
                RequestTimeout(
                    f"the request's {what.value} did not arrive in time: it has {self.receipt_s:g} s, and a body "
                    f"beyond that must come at {MIN_BYTES_PER_S} bytes per second or more: send the request again",
                )
            )

    def _refuse(self, error: QLoRAError) -> None:
        """Answers in place of the application, and closes the connection."""
        awaited = self._awaited
        self._expect(None)
        response = refusal(error)
        headers = [*response.raw_headers, CLOSE_HEADER]
        status = response.status_code
        events: list[h11.Event] = [h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])]
        if not (awaited is Awaited.BODY and self.scope["method"] == "HEAD"):
            events.append(h11.Data(data=bytes(response.body)))
        for event in (*events, h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        if awaited is Awaited.BODY:
            # The application still runs, and learns of it when it reads on.
            self.cycle.disconnected = True
        self.transport.close()


def receipt_protocol(receipt_s: float) -> type[ReceiptProtocol]:
    """The protocol with this many seconds for a head, and for a body's beginning."""
    limits = {"receipt_s": receipt_s, "max_connections": _connections()}
    return type("BoundReceiptProtocol", (ReceiptProtocol,), limits)


def _connections() -> int:
    """Most connections this process can hold, after it was allowed as many open files as they need."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + SPARE_FILES
    if allowed != resource.RLIM_INFINITY and allowed < wanted:
        allowed = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
    return MAX_CONNECTIONS if allowed == resource.RLIM_INFINITY else max(1, min(wanted, allowed) - SPARE_FILES)
