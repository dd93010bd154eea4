"""Chat server of a process that has a base loaded: a Unix socket, a request queue, one answer at a time. No torch.

Requests are queued, also while the base is loading. When the slot is needed for other work, the current answer is
finished and every other request is refused with `YieldingSlot`, which makes the API send it again.
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
    KEEPALIVE_S,
    MAX_LINE_BYTES,
    STATUS,
    Answer,
    Finished,
    GenerationRequest,
    Line,
    Place,
    Status,
    YieldingSlot,
)
from qlora_service.errors import QLoRAError, QuotaExceeded

MAX_QUEUED = 16
RECEIVE_TIMEOUT_S = 10.0
"""Seconds for a whole request to arrive: clients are on this machine"""
SEND_TIMEOUT_S = 30.0
"""A client that accepts no bytes for this long counts as gone."""

Emit = Callable[[str], None]
"""Sends a piece of an answer. Raises: ClientGone"""
log = structlog.get_logger()


class ClientGone(Exception):
    """The client has closed its connection."""


class ChatConnection:
    """A client's connection with its request; safe to send to from several threads."""

    def __init__(self, connection: socket.socket, request: GenerationRequest) -> None:
        self.request = request
        self.is_generating = False
        self.ended = threading.Event()
        self._connection = connection
        self._send_lock = threading.Lock()

    def send(self, line: Line) -> None:
        """Raises: ClientGone."""
        try:
            with self._send_lock:
                self._connection.sendall(line.line())
        except OSError:
            raise ClientGone from None

    def send_text(self, text: str) -> None:
        """Sends a piece of the answer, unless it is empty. Raises: ClientGone, also for an empty piece."""
        if text:
            self.send(Answer(text=text))
        elif self.is_client_gone():
            raise ClientGone

    def is_client_gone(self) -> bool:
        """Whether the client has closed the connection: it sends nothing after its request."""
        readable, _, _ = select.select([self._connection], [], [], 0)
        return bool(readable)

    def close_with_error(self, error: QLoRAError) -> None:
        """Sends the error and closes the connection."""
        with contextlib.suppress(ClientGone):
            self.send(Answer(error=error.as_dict()))
        self.close()

    def close(self) -> None:
        self.ended.set()
        self._connection.close()


class RequestQueue:
    """Accepts connections at a listening socket and queues their requests."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._accept_thread = threading.Thread(target=self._accept, name="accept", daemon=True)
        self._queue: queue.Queue[ChatConnection | None] = queue.Queue(MAX_QUEUED)
        self._enqueue_lock = threading.Lock()
        self._drain_error: QLoRAError | None = None
        self._is_loading, self._is_busy, self._served = True, False, 0
        self._progress_at = time.monotonic()

    def open(self) -> None:
        """Starts to accept connections."""
        self._accept_thread.start()

    def close(self) -> None:
        """Stops accepting; connections that were already made receive the error that `drain` was given."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accept_thread.join()
        self._listener.close()

    def finish_loading(self) -> None:
        """Marks the base as loaded: requests can be answered from now on."""
        self._is_loading = False
        self.note_progress()

    def note_progress(self) -> None:
        """Restarts the time without progress that the status reports."""
        self._progress_at = time.monotonic()

    def next(self) -> ChatConnection | None:
        """The next connection to answer; blocks until there is one. None after `drain`."""
        self._is_busy = False
        self.note_progress()
        connection = self._queue.get()
        if connection is not None:
            self._is_busy, self._served = True, self._served + 1
            self.note_progress()
            connection.is_generating = True
        return connection

    def drain(self, error: QLoRAError) -> None:
        """Refuses queued and new requests with `error`, and ends `next`; the current answer is finished."""
        with self._enqueue_lock:
            self._drain_error = error
            while True:
                try:
                    queued = self._queue.get_nowait()
                except queue.Empty:
                    break
                if queued is not None:
                    queued.close_with_error(error)
            self._queue.put(None)

    def yield_slot(self) -> None:
        """Drains, because the slot is needed for other work; exits the process if the base is still loading."""
        self.drain(YieldingSlot("the worker is yielding the GPU: retry"))
        if self._is_loading:
            os._exit(0)  # loading a base cannot be interrupted

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # the listener is closed
                return
            threading.Thread(target=self._receive, args=(connection,), name="connection", daemon=True).start()

    def _receive(self, connection: socket.socket) -> None:
        connection.settimeout(RECEIVE_TIMEOUT_S)
        try:
            with connection.makefile("rb") as incoming:
                line = incoming.readline(MAX_LINE_BYTES)
            connection.settimeout(SEND_TIMEOUT_S)
            if line == STATUS:
                connection.sendall(self._status().line())
                connection.close()
                return
            chat = ChatConnection(connection, GenerationRequest.model_validate_json(line))
        except (OSError, ValidationError):
            connection.close()
            return
        self._enqueue(chat)

    def _status(self) -> Status:
        return Status(
            loading=self._is_loading,
            busy=self._is_busy,
            in_line=self._queue.qsize(),
            served=self._served,
            quiet_s=time.monotonic() - self._progress_at,
        )

    def _enqueue(self, connection: ChatConnection) -> None:
        """Queues the request, and sends the client its state every second until its answer ends."""
        with self._enqueue_lock:
            if self._drain_error is not None:
                connection.close_with_error(self._drain_error)
                return
            try:
                self._queue.put_nowait(connection)
            except queue.Full:
                connection.close_with_error(
                    QuotaExceeded(f"{MAX_QUEUED} chats are queued already: send the request again later")
                )
                return
        with contextlib.suppress(ClientGone):
            while not connection.ended.wait(KEEPALIVE_S):
                connection.send(Answer(waiting=self._place_of(connection)))

    def _place_of(self, connection: ChatConnection) -> Place:
        if self._is_loading:
            return "loading"
        return "generating" if connection.is_generating else "in line"


def serve(requests: RequestQueue, generate: Callable[[GenerationRequest, Emit], Finished]) -> None:
    """Answers requests until the queue is drained.

    Raises an unexpected error of `generate` again: the model may be in an undefined state, so the process must end.
    """
    while (connection := requests.next()) is not None:
        try:
            if not connection.is_client_gone():
                finished = generate(connection.request, partial(_emit, requests, connection))
                connection.send(Answer(finished=finished))
        except ClientGone:
            log.info("client_gone")
        except QLoRAError as error:
            connection.close_with_error(error)
        except Exception:
            connection.close_with_error(
                QLoRAError("the model failed on this request; the log of its process has the details")
            )
            raise
        finally:
            connection.close()


def _emit(requests: RequestQueue, connection: ChatConnection, text: str) -> None:
    requests.note_progress()
    connection.send_text(text)
