"""A trainer's line to its supervisor: one Unix socket, its stdin. Work comes in, and what it waits with goes out."""

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

LEAVE = b"leave\n"
"""Sent to a trainer that answers chats: somebody else needs the slot."""
MAX_BYTES = 1 << 16


@dataclass(frozen=True)
class Attempt:
    """A claim to run, and the file that takes what is printed meanwhile."""

    claim: Claim
    log_path: Path

    def send(self, to: socket.socket) -> None:
        """Raises: OSError, when nobody is there any more."""
        _send(to, {"job": self.claim.job_id, "token": self.claim.token, "log": str(self.log_path)})


@dataclass(frozen=True)
class ChatTurn:
    """A base to answer chats with, at a socket that listens already, until asked to leave."""

    base: LoadedBase
    listener: socket.socket
    log_path: Path

    def send(self, to: socket.socket) -> None:
        """The listener goes along; the sender's is its own still. Raises: OSError."""
        _send(to, {"chat": vars(self.base), "log": str(self.log_path)}, self.listener.fileno())


Assignment = Attempt | ChatTurn


class SupervisorLine:
    """The process does not outlive its supervisor, but for writing an outcome."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._assignments: SimpleQueue[Assignment] = SimpleQueue()
        self._is_finishing = self._is_gone = False
        self._asking = threading.Lock()
        self._is_asked_to_leave = False
        self._leave: Callable[[], object] | None = None

    def start(self) -> None:
        """Listen from now on; on SIGUSR1, print where every thread stands, as the supervisor asks before it kills."""
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        threading.Thread(target=self._listen, name="supervisor", daemon=True).start()

    def next_assignment(self) -> Assignment:
        """What to do next, waited for."""
        return self._assignments.get()

    def wait_with(self, base: NeededBase) -> None:
        """Tell the supervisor that the work is done, and what is loaded for the next."""
        try:
            self._connection.sendall(base.as_json().encode() + b"\n")
        except OSError:
            os._exit(exit_codes.SUPERVISOR_GONE)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Inside, an outcome is written: it counts also when the supervisor has gone."""
        self._is_finishing = True
        try:
            yield
        finally:
            self._is_finishing = False
            if self._is_gone:
                os._exit(exit_codes.SUPERVISOR_GONE)

    @contextmanager
    def leaving_by(self, leave: Callable[[], object]) -> Iterator[None]:
        """Inside, `leave` is called when somebody else needs the slot; at once if that was said before."""
        with self._asking:
            self._leave = leave
            if self._is_asked_to_leave:
                leave()
        try:
            yield
        finally:
            with self._asking:
                self._leave, self._is_asked_to_leave = None, False

    def _listen(self) -> None:
        received, listeners = b"", list[int]()
        # The supervisor holds the other end: reading ends when it is gone, however it went, or wants us to go.
        while True:
            try:
                chunk, descriptors, _, _ = socket.recv_fds(self._connection, MAX_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            except ConnectionResetError:
                break
            if not chunk:
                break
            listeners += descriptors
            *lines, received = (received + chunk).split(b"\n")
            for line in lines:
                if line + b"\n" == LEAVE:
                    self._obey()
                else:
                    self._assignments.put(_assignment(json.loads(line), listeners))
        self._is_gone = True
        if not self._is_finishing:
            os._exit(exit_codes.SUPERVISOR_GONE)

    def _obey(self) -> None:
        with self._asking:
            self._is_asked_to_leave = True
            if self._leave is not None:
                self._leave()


def _assignment(values: dict[str, Any], listeners: list[int]) -> Assignment:
    log_path = Path(values["log"])
    if "chat" in values:
        return ChatTurn(LoadedBase(**values["chat"]), socket.socket(fileno=listeners.pop(0)), log_path)
    return Attempt(Claim(values["job"], values["token"]), log_path)


def _send(to: socket.socket, values: dict[str, Any], *descriptors: int) -> None:
    line = json.dumps(values).encode() + b"\n"
    sent = socket.send_fds(to, [line], descriptors)
    to.sendall(line[sent:])
