"""The trainer of one slot as its supervisor sees it: started, given one claim after the other, ended. No torch."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import structlog

from qlora_service.jobs import Job
from qlora_service.lifeline import kill_group
from qlora_service.models.needed_base import NeededBase, may_change_base
from qlora_service.queue import Claim
from workers.supervisor_line import Assignment

LEAVE_S = 2.0
"""How long a trainer without a job may take to end."""

log = structlog.get_logger()
State = Literal["works", "waits", "ended"]


class SlotTrainer:
    """At most one process at a time. Used by the slot's thread alone."""

    def __init__(
        self, *, slot: str, device: str, environment: Mapping[str, str], lock: int, log_dir: Path, warm_s: float
    ) -> None:
        """`lock` is the descriptor of the slot's lock; `warm_s` is how long a base stays loaded for the next job."""
        self._slot, self._device, self._environment = slot, device, environment
        self._lock, self._log_dir, self._warm_s = lock, log_dir, warm_s
        self._child: subprocess.Popen[bytes] | None = None
        self._reports = -1
        self._waits_with: NeededBase | None = None
        self._waits_since = 0.0

    @property
    def warm(self) -> NeededBase | None:
        """The base that a trainer waits with for the next job."""
        return self._waits_with

    def begin(self, claim: Claim, job: Job) -> None:
        """Have the claim's attempt run: by the trainer that waits, if it has the base, else by a new one.

        Raises:
            OSError: no room for the log, no process to be had; there is no trainer then.
        """
        assignment = Assignment(claim, self._log_dir / f"{claim.name}.log")
        fits = self._waits_with == NeededBase.of(job.spec, job.base_weights_sha256)
        if not fits or may_change_base(job.spec.adapter) or self._is_dead():
            self.release()
        try:
            with assignment.log_path.open("wb") as output:
                if self._child is None:
                    self._start(output.fileno())
            self._hand_over(assignment)
        except OSError:
            self.end()
            raise

    def wait(self, seconds: float) -> State:
        """What the trainer does once that has changed, or after so many seconds."""
        assert self._child is not None
        if select.select([self._reports], [], [], seconds)[0]:
            if report := os.read(self._reports, 1 << 16):  # one line, written in one piece
                self._waits_with, self._waits_since = NeededBase.from_json(report), time.monotonic()
                return "waits"
            self.wait_for_end(seconds)
        return "works" if self._child.poll() is None else "ended"

    def send_signal(self, number: signal.Signals) -> None:
        assert self._child is not None
        self._child.send_signal(number)

    def wait_for_end(self, seconds: float) -> None:
        """Returns when it has ended, or after so many seconds."""
        assert self._child is not None
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(seconds)

    def end(self) -> int:
        """The exit code of the trainer, killed unless it had ended; afterwards there is none."""
        child, self._child, self._waits_with = self._child, None, None
        if child is None:
            return 0
        kill_group(child)
        code = child.wait()
        assert child.stdin is not None
        with suppress(BrokenPipeError):
            child.stdin.close()
        os.close(self._reports)
        return code

    def release(self) -> None:
        """End the trainer that waits, if there is one: its memory is free when this returns."""
        if self._child is not None:
            assert self._child.stdin is not None
            with suppress(BrokenPipeError):
                self._child.stdin.close()
            self.wait_for_end(LEAVE_S)
            log.info("base_released", slot=self._slot, waited_s=round(time.monotonic() - self._waits_since, 1))
            self.end()

    def release_if_idle(self) -> None:
        """The same once it has waited for too long, or has ended by itself."""
        if self._child is not None and (self._is_dead() or time.monotonic() - self._waits_since > self._warm_s):
            self.release()

    def _is_dead(self) -> bool:
        return self._child is None or self._child.poll() is not None

    def _start(self, output: int) -> None:
        self._reports, report = os.pipe()
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "workers.trainer", self._device, str(report)],
                stdin=subprocess.PIPE,  # claims go in; its closing tells the trainer that we are gone
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(self._environment),
                pass_fds=[self._lock, report],
                start_new_session=True,
                bufsize=0,
            )
        except OSError:
            os.close(self._reports)
            raise
        finally:
            os.close(report)

    def _hand_over(self, assignment: Assignment) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        self._waits_with = None
        with suppress(BrokenPipeError):  # whoever waits for it sees that it has ended
            self._child.stdin.write(assignment.as_json().encode() + b"\n")
