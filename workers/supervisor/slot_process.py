"""The child process of one slot, as its supervisor sees it: started, given assignments one after the other, ended.

The process imports torch, trains and answers chats on the base that it keeps loaded. This module imports no torch.
"""

from __future__ import annotations

import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import structlog

from qlora_service.domain.jobs import Job
from qlora_service.models.base.needed_base import NeededBase, may_change_base
from qlora_service.process.child import kill_group
from qlora_service.queue.claim import Claim
from qlora_service.store.inference import LoadedBase
from workers.supervisor_channel import MAX_BYTES, YIELD_SLOT, Assignment, Attempt, ChatTurn

EXIT_GRACE_S = 2.0
"""Seconds that an idle process has to exit before it is killed."""

log = structlog.get_logger()
State = Literal["busy", "idle", "ended"]


class SlotProcess:
    """At most one process at a time. Used by the slot's thread only."""

    def __init__(
        self, *, slot: str, device: str, environment: Mapping[str, str], lock: int, log_dir: Path, warm_s: float
    ) -> None:
        """`lock` is the descriptor of the slot's lock; an idle process keeps its base loaded for `warm_s` seconds."""
        self._slot, self._device, self._environment = slot, device, environment
        self._lock, self._log_dir, self._warm_s = lock, log_dir, warm_s
        self._child: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._idle_base: NeededBase | None = None
        self._idle_since = 0.0

    @property
    def warm(self) -> NeededBase | None:
        """The base of the idle process; None without one."""
        return self._idle_base

    def begin(self, claim: Claim, job: Job) -> None:
        """Starts the claim's attempt, in the idle process if that has the job's base, else in a new process.

        Raises:
            OSError: the log cannot be written or no process can be started; the slot has no process then.
        """
        needed = NeededBase.of(job.spec, job.base_weights_sha256)
        attempt = Attempt(claim, self._log_dir / f"{claim.name}.log")
        self._assign(attempt, None if may_change_base(job.spec.adapter) else needed)

    def begin_chat(self, base: LoadedBase, needed: NeededBase | None, listener: socket.socket) -> int:
        """The pid of the process that answers chats at `listener`, chosen as in `begin`.

        `needed` is None if the catalog does not have the base.

        Raises:
            OSError: as in `begin`.
        """
        self._assign(ChatTurn(base, listener, self._log_dir / f"inference-{self._slot}.log"), needed)
        assert self._child is not None
        return self._child.pid

    def wait(self, seconds: float) -> State:
        """The state of the process, once it has changed or after `seconds`."""
        assert self._child is not None
        assert self._channel is not None
        if select.select([self._channel], [], [], seconds)[0]:
            report = b""
            with suppress(ConnectionResetError):
                report = self._channel.recv(MAX_BYTES)  # one message, sent in one piece
            if report:
                self._idle_base, self._idle_since = NeededBase.from_json(report), time.monotonic()
                return "idle"
            self.wait_for_end(seconds)
        return "busy" if self._child.poll() is None else "ended"

    def request_yield(self) -> None:
        """Asks the process to finish the current chat, begin no other one, and yield the slot."""
        assert self._channel is not None
        with suppress(OSError):
            self._channel.sendall(YIELD_SLOT)

    def send_signal(self, number: signal.Signals) -> None:
        assert self._child is not None
        self._child.send_signal(number)

    def wait_for_end(self, seconds: float) -> None:
        """Returns when the process has ended, or after `seconds`."""
        assert self._child is not None
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(seconds)

    def end(self) -> int:
        """The exit code of the process, which is killed if it still runs; 0 if the slot has no process."""
        child, self._child, self._idle_base = self._child, None, None
        if child is None:
            return 0
        kill_group(child)
        code = child.wait()
        assert self._channel is not None
        self._channel.close()
        return code

    def release(self) -> None:
        """Ends the idle process, if any; its memory is free when this returns."""
        if self._child is not None:
            assert self._channel is not None
            with suppress(OSError):
                self._channel.shutdown(socket.SHUT_WR)
            self.wait_for_end(EXIT_GRACE_S)
            log.info("base_released", slot=self._slot, waited_s=round(time.monotonic() - self._idle_since, 1))
            self.end()

    def release_if_idle(self) -> None:
        """`release`, if the process has been idle for longer than `warm_s` or has ended."""
        if self._child is not None and (self._is_dead() or time.monotonic() - self._idle_since > self._warm_s):
            self.release()

    def _assign(self, assignment: Assignment, needed: NeededBase | None) -> None:
        """Gives the assignment to the idle process if that has the base `needed`, else to a new process."""
        if needed is None or self._idle_base != needed or self._is_dead():
            self.release()
        try:
            with assignment.log_path.open("wb") as output:
                if self._child is None:
                    self._start(output.fileno())
            self._send(assignment)
        except OSError:
            self.end()
            raise

    def _is_dead(self) -> bool:
        return self._child is None or self._child.poll() is not None

    def _start(self, output: int) -> None:
        parent_end, child_end = socket.socketpair()
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "workers.trainer", self._device],
                stdin=child_end.fileno(),  # closes when the supervisor ends; the process then exits
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(self._environment),
                pass_fds=[self._lock],
                start_new_session=True,
            )
        except OSError:
            parent_end.close()
            raise
        finally:
            child_end.close()
        self._channel = parent_end

    def _send(self, assignment: Assignment) -> None:
        assert self._channel is not None
        self._idle_base = None
        with suppress(BrokenPipeError, ConnectionResetError):  # `wait` reports that the process has ended
            assignment.send(self._channel)
