"""Chats at a socket, answered one at a time: the desk of a process that has a base loaded. No torch.

Who comes waits in line, also while the base is being loaded; when somebody else needs the slot, what has begun is
finished and everybody else is asked to come back.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

import structlog
from pydantic import ValidationError

from qlora_service.chat.wire import (
    BEAT_S,
    MAX_LINE_BYTES,
    STATUS,
    Answer,
    Finished,
    GenerationRequest,
    Leaving,
    Line,
    Place,
    Status,
)
from qlora_service.errors import QLoRAError, QuotaExceeded

MAX_IN_LINE = 16
RECEIPT_S = 10.0
"""A request has arrived within this time: it comes from this machine."""
SEND_S = 30.0
"""Who takes nothing for so long is gone."""

Show = Callable[[str], None]
log = structlog.get_logger()


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Visitor:
    """A connection with a request; lines to it may be sent by several threads."""

    def __init__(self, connection: socket.socket, request: GenerationRequest) -> None:
        self.request = request
        self.begun = False
        self.ended = threading.Event()
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, line: Line) -> None:
        """Raises: ClientGone."""
        try:
            with self._sending:
                self._connection.sendall(line.line())
        except OSError:
            raise ClientGone from None

    def show(self, text: str) -> None:
        """Send a piece of the answer, if it is one. Raises: ClientGone, also when there is nothing to send."""
        if text:
            self.send(Answer(text=text))
        elif self.has_left():
            raise ClientGone

    def has_left(self) -> bool:
        """Whether the other side has closed the connection; it sends nothing after its request."""
        readable, _, _ = select.select([self._connection], [], [], 0)
        return bool(readable)

    def dismiss(self, error: QLoRAError) -> None:
        """Say why there is no answer, or no more of it, and end."""
        with contextlib.suppress(ClientGone):
            self.send(Answer(error=error.as_dict()))
        self.close()

    def close(self) -> None:
        self.ended.set()
        self._connection.close()


class Desk:
    """Takes requests from the socket, lets them wait in line, and gives them out one by one."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._accepting = threading.Thread(target=self._accept, name="accept", daemon=True)
        self._line: queue.Queue[Visitor | None] = queue.Queue(MAX_IN_LINE)
        self._entering = threading.Lock()
        self._leaving: QLoRAError | None = None
        self._loading, self._busy, self._served = True, False, 0
        self._sign_at = time.monotonic()

    def open(self) -> None:
        """From now on connections are taken."""
        self._accepting.start()

    def close(self) -> None:
        """Take no more connections: those that were made are told why, as it was said to `leave`."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()

    def loaded(self) -> None:
        """Requests can be answered now."""
        self._loading = False
        self.progressed()

    def progressed(self) -> None:
        """A sign of progress."""
        self._sign_at = time.monotonic()

    def next(self) -> Visitor | None:
        """Whose turn it is, waited for; None when it is time to leave."""
        self._busy = False
        self.progressed()
        visitor = self._line.get()
        if visitor is not None:
            self._busy, self._served = True, self._served + 1
            self.progressed()
            visitor.begun = True
        return visitor

    def leave(self, why: QLoRAError) -> None:
        """Begin nothing more: who waits or comes is told `why`, what has begun is finished."""
        with self._entering:
            self._leaving = why
            while True:
                try:
                    waiting = self._line.get_nowait()
                except queue.Empty:
                    break
                if waiting is not None:
                    waiting.dismiss(why)
            self._line.put(None)

    def make_room(self) -> None:
        """Somebody else needs the slot. What loads a base cannot be told so: it ends with the process."""
        self.leave(Leaving("the process makes room: ask anew"))
        if self._loading:
            os._exit(0)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # it was closed
                return
            threading.Thread(target=self._receive, args=(connection,), name="visitor", daemon=True).start()

    def _receive(self, connection: socket.socket) -> None:
        connection.settimeout(RECEIPT_S)
        try:
            with connection.makefile("rb") as incoming:
                line = incoming.readline(MAX_LINE_BYTES)
            connection.settimeout(SEND_S)
            if line == STATUS:
                connection.sendall(self._status().line())
                connection.close()
                return
            visitor = Visitor(connection, GenerationRequest.model_validate_json(line))
        except (OSError, ValidationError):
            connection.close()
            return
        self._wait_in_line(visitor)

    def _status(self) -> Status:
        return Status(
            loading=self._loading,
            busy=self._busy,
            in_line=self._line.qsize(),
            served=self._served,
            quiet_s=time.monotonic() - self._sign_at,
        )

    def _wait_in_line(self, visitor: Visitor) -> None:
        with self._entering:
            if self._leaving is not None:
                visitor.dismiss(self._leaving)
                return
            try:
                self._line.put_nowait(visitor)
            except queue.Full:
                busy = QuotaExceeded(f"{MAX_IN_LINE} chats wait already: send the request again in a moment")
                visitor.dismiss(busy)
                return
        with contextlib.suppress(ClientGone):
            while not visitor.ended.wait(BEAT_S):
                visitor.send(Answer(waiting=self._place_of(visitor)))

    def _place_of(self, visitor: Visitor) -> Place:
        if self._loading:
            return "loading"
        return "generating" if visitor.begun else "in line"


def serve(desk: Desk, generate: Callable[[GenerationRequest, Show], Finished]) -> None:
    """Answer requests until it is time to leave; a defect ends the process, which it may have left in any state."""
    while (visitor := desk.next()) is not None:
        try:
            if not visitor.has_left():
                visitor.send(Answer(finished=generate(visitor.request, partial(_show, desk, visitor))))
        except ClientGone:
            log.info("client_gone")
        except QLoRAError as error:
            visitor.dismiss(error)
        except Exception:
            visitor.dismiss(QLoRAError("the model failed at this; the log of the process that ran it has the details"))
            raise
        finally:
            visitor.close()


def _show(desk: Desk, visitor: Visitor, text: str) -> None:
    desk.progressed()
    visitor.show(text)
