"""The channel between a trainer and its supervisor: one Unix socket, the trainer's stdin.

The supervisor sends assignments; the trainer reports the base that it has loaded when it is idle.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from qlora_service.models.base.needed_base import NeededBase
from qlora_service.queue.claim import Claim
from qlora_service.store.inference import LoadedBase
from workers import exit_codes

YIELD_SLOT = b"leave\n"
"""Sent to a trainer that answers chats, when the slot is needed for other work."""
MAX_BYTES = 1 << 16


@dataclass(frozen=True)
class Attempt:
    """A claim to run, and the log file of its output."""

    claim: Claim
    log_path: Path

    def send(self, to: socket.socket) -> None:
        """Raises: OSError, when the trainer has ended."""
        _send(to, {"job": self.claim.job_id, "token": self.claim.token, "log": str(self.log_path)})


@dataclass(frozen=True)
class ChatTurn:
    """A base to answer chats with, at a listening socket, until the supervisor requests the slot."""

    base: LoadedBase
    listener: socket.socket
    log_path: Path

    def send(self, to: socket.socket) -> None:
        """Sends the listener too; the sender keeps its own copy. Raises: OSError, when the trainer has ended."""
        _send(to, {"chat": vars(self.base), "log": str(self.log_path)}, self.listener.fileno())


Assignment = Attempt | ChatTurn


class SupervisorChannel:
    """The trainer's end. The process exits when its supervisor ends, unless it is writing an outcome."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._assignments: SimpleQueue[Assignment] = SimpleQueue()
        self._is_finishing = self._is_closed = False
        self._yield_lock = threading.Lock()
        self._is_yield_requested = False
        self._yield_slot: Callable[[], object] | None = None

    def start(self) -> None:
        """Starts to receive. From now on SIGUSR1, sent before SIGKILL, prints the stacks of all threads."""
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        threading.Thread(target=self._receive, name="supervisor", daemon=True).start()

    def next_assignment(self) -> Assignment:
        """The next assignment; blocks until it arrives."""
        return self._assignments.get()

    def report_idle(self, base: NeededBase) -> None:
        """Reports the end of the assignment, and the base that is loaded for the next one."""
        try:
            self._connection.sendall(base.as_json().encode() + b"\n")
        except OSError:
            os._exit(exit_codes.SUPERVISOR_GONE)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Context for writing an outcome: if the supervisor ends meanwhile, the process exits only afterwards."""
        self._is_finishing = True
        try:
            yield
        finally:
            self._is_finishing = False
            if self._is_closed:
                os._exit(exit_codes.SUPERVISOR_GONE)

    @contextmanager
    def on_yield_request(self, yield_slot: Callable[[], object]) -> Iterator[None]:
        """Context in which the supervisor's request for the slot calls `yield_slot`; also one that arrived before."""
        with self._yield_lock:
            self._yield_slot = yield_slot
            if self._is_yield_requested:
                yield_slot()
        try:
            yield
        finally:
            with self._yield_lock:
                self._yield_slot, self._is_yield_requested = None, False

    def _receive(self) -> None:
        """Receives until the supervisor closes the channel, or ends for any reason."""
        received, listeners = b"", list[int]()
        while True:
            try:
                chunk, descriptors, _, _ = socket.recv_fds(self._connection, MAX_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            except ConnectionResetError:
                break
            if not chunk:
                break
            listeners += descriptors
            *messages, received = (received + chunk).split(b"\n")
            for message in messages:
                if message + b"\n" == YIELD_SLOT:
                    self._request_yield()
                else:
                    self._assignments.put(_parse_assignment(json.loads(message), listeners))
        self._is_closed = True
        if not self._is_finishing:
            os._exit(exit_codes.SUPERVISOR_GONE)

    def _request_yield(self) -> None:
        with self._yield_lock:
            self._is_yield_requested = True
            if self._yield_slot is not None:
                self._yield_slot()


def _parse_assignment(values: dict[str, Any], listeners: list[int]) -> Assignment:
    """The assignment that a message holds; a chat turn takes the first of `listeners`, the received descriptors."""
    log_path = Path(values["log"])
    if "chat" in values:
        return ChatTurn(LoadedBase(**values["chat"]), socket.socket(fileno=listeners.pop(0)), log_path)
    return Attempt(Claim(values["job"], values["token"]), log_path)


def _send(to: socket.socket, values: dict[str, Any], *descriptors: int) -> None:
    message = json.dumps(values).encode() + b"\n"
    sent_bytes = socket.send_fds(to, [message], descriptors)
    to.sendall(message[sent_bytes:])
