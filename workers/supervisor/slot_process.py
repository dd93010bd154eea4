"""The process with torch of one slot, as its supervisor sees it: started, given one piece of work after the other,
ended. It trains and answers chats on the base that it has loaded. No torch."""

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
from workers.supervisor_channel import LEAVE, MAX_BYTES, Assignment, Attempt, ChatTurn

LEAVE_S = 2.0
"""How long a process without work may take to end."""

log = structlog.get_logger()
State = Literal["works", "waits", "ended"]


class SlotProcess:
    """At most one process at a time. Used by the slot's thread alone."""

    def __init__(
        self, *, slot: str, device: str, environment: Mapping[str, str], lock: int, log_dir: Path, warm_s: float
    ) -> None:
        """`lock` is the descriptor of the slot's lock; `warm_s` is how long a base stays loaded for the next job."""
        self._slot, self._device, self._environment = slot, device, environment
        self._lock, self._log_dir, self._warm_s = lock, log_dir, warm_s
        self._child: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._waits_with: NeededBase | None = None
        self._waits_since = 0.0

    @property
    def warm(self) -> NeededBase | None:
        """The base that it waits with."""
        return self._waits_with

    def begin(self, claim: Claim, job: Job) -> None:
        """Have the claim's attempt run: by the process that waits, if it has the base, else by a new one.

        Raises:
            OSError: no room for the log, no process to be had; there is none then.
        """
        needed = NeededBase.of(job.spec, job.base_weights_sha256)
        attempt = Attempt(claim, self._log_dir / f"{claim.name}.log")
        self._begin(attempt, None if may_change_base(job.spec.adapter) else needed)

    def begin_chat(self, base: LoadedBase, needed: NeededBase | None, listener: socket.socket) -> int:
        """Have chats answered at the socket, in the same way; the pid. `needed` is None where nobody knows the base.

        Raises:
            OSError: as `begin`.
        """
        self._begin(ChatTurn(base, listener, self._log_dir / f"inference-{self._slot}.log"), needed)
        assert self._child is not None
        return self._child.pid

    def wait(self, seconds: float) -> State:
        """What the process does once that has changed, or after so many seconds."""
        assert self._child is not None
        assert self._line is not None
        if select.select([self._line], [], [], seconds)[0]:
            report = b""
            with suppress(ConnectionResetError):
                report = self._line.recv(MAX_BYTES)  # one line, written in one piece
            if report:
                self._waits_with, self._waits_since = NeededBase.from_json(report), time.monotonic()
                return "waits"
            self.wait_for_end(seconds)
        return "works" if self._child.poll() is None else "ended"

    def ask_to_leave(self) -> None:
        """Have it answer no more chats than it has begun."""
        assert self._line is not None
        with suppress(OSError):
            self._line.sendall(LEAVE)

    def send_signal(self, number: signal.Signals) -> None:
        assert self._child is not None
        self._child.send_signal(number)

    def wait_for_end(self, seconds: float) -> None:
        """Returns when it has ended, or after so many seconds."""
        assert self._child is not None
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(seconds)

    def end(self) -> int:
        """The exit code of the process, killed unless it had ended; afterwards there is none."""
        child, self._child, self._waits_with = self._child, None, None
        if child is None:
            return 0
        kill_group(child)
        code = child.wait()
        assert self._line is not None
        self._line.close()
        return code

    def release(self) -> None:
        """End the process that waits, if there is one: its memory is free when this returns."""
        if self._child is not None:
            assert self._line is not None
            with suppress(OSError):
                self._line.shutdown(socket.SHUT_WR)
            self.wait_for_end(LEAVE_S)
            log.info("base_released", slot=self._slot, waited_s=round(time.monotonic() - self._waits_since, 1))
            self.end()

    def release_if_idle(self) -> None:
        """The same once it has waited for too long, or has ended by itself."""
        if self._child is not None and (self._is_dead() or time.monotonic() - self._waits_since > self._warm_s):
            self.release()

    def _begin(self, assignment: Assignment, needed: NeededBase | None) -> None:
        """`needed` is None for work that must not find a base that others had."""
        if needed is None or self._waits_with != needed or self._is_dead():
            self.release()
        try:
            with assignment.log_path.open("wb") as output:
                if self._child is None:
                    self._start(output.fileno())
            self._hand_over(assignment)
        except OSError:
            self.end()
            raise

    def _is_dead(self) -> bool:
        return self._child is None or self._child.poll() is not None

    def _start(self, output: int) -> None:
        ours, theirs = socket.socketpair()
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "workers.trainer", self._device],
                stdin=theirs.fileno(),  # its closing tells the process that we are gone
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(self._environment),
                pass_fds=[self._lock],
                start_new_session=True,
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._line = ours

    def _hand_over(self, assignment: Assignment) -> None:
        assert self._line is not None
        self._waits_with = None
        with suppress(BrokenPipeError, ConnectionResetError):  # whoever waits for it sees that it has ended
            assignment.send(self._line)
