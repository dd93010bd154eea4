"""A trainer's line to its supervisor: claims come in by its stdin, what it waits with goes out by a pipe of its own."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from qlora_service.models.needed_base import NeededBase
from qlora_service.queue import Claim
from workers import exit_codes


@dataclass(frozen=True)
class Assignment:
    """A claim, and the file that takes what is printed meanwhile."""

    claim: Claim
    log_path: Path

    @classmethod
    def from_json(cls, line: str | bytes) -> Assignment:
        values = json.loads(line)
        return cls(Claim(values["job"], values["token"]), Path(values["log"]))

    def as_json(self) -> str:
        return json.dumps({"job": self.claim.job_id, "token": self.claim.token, "log": str(self.log_path)})


class SupervisorLine:
    """The process does not outlive its supervisor, but for writing an outcome."""

    def __init__(self, report: int) -> None:
        """`report` is the descriptor of the pipe that the supervisor reads."""
        self._report = report
        self._assignments: SimpleQueue[Assignment] = SimpleQueue()
        self._is_finishing = self._is_gone = False

    def start(self) -> None:
        """Listen from now on."""
        threading.Thread(target=self._listen, name="supervisor", daemon=True).start()

    def next_assignment(self) -> Assignment:
        """The next claim, waited for."""
        return self._assignments.get()

    def wait_with(self, base: NeededBase) -> None:
        """Tell the supervisor that the outcome is written, and what is loaded for the next claim."""
        try:
            os.write(self._report, base.as_json().encode() + b"\n")
        except BrokenPipeError:
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

    def _listen(self) -> None:
        received = b""
        # The supervisor holds the other end: reading ends when it is gone, however it went, or wants us to go.
        while chunk := os.read(0, 1 << 16):
            *lines, received = (received + chunk).split(b"\n")
            for line in lines:
                self._assignments.put(Assignment.from_json(line))
        self._is_gone = True
        if not self._is_finishing:
            os._exit(exit_codes.SUPERVISOR_GONE)
