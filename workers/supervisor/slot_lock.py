"""A lock file per slot: two trainers never share a GPU, even if one of them was believed dead."""

from __future__ import annotations

import fcntl
import os
import uuid
from pathlib import Path


class SlotLock:
    """The right to use one slot of this machine.

    The kernel ties the lock to the open file, which the slot's trainers inherit: it is released when the supervisor and
    every trainer that it started have ended, for any reason.
    """

    def __init__(self, directory: Path, name: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{name}.lock"
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.identity = ""
        """Random hex that identifies the lock file among all machines and directories; set by `acquire`"""

    def acquire(self) -> bool:
        """Whether this process holds the lock now; never blocks."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self.identity = os.pread(self.descriptor, 32, 0).decode()
        if not self.identity:
            self.identity = uuid.uuid4().hex
            os.pwrite(self.descriptor, self.identity.encode(), 0)
        return True

    def other_holders(self) -> list[int]:
        """Pids of the other processes on this machine that have the lock file open."""
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [pid for pid in pids if pid != os.getpid() and self.is_open_in(pid)]

    def is_open_in(self, pid: int) -> bool:
        """Whether a process has the lock file open; False if it has ended or belongs to another user."""
        try:
            return any(link.readlink() == self.path for link in Path(f"/proc/{pid}/fd").iterdir())
        except OSError:
            return False

    def close(self) -> None:
        os.close(self.descriptor)
