"""A lock file per slot: two trainers never share a card, not even when one of them was believed dead."""

from __future__ import annotations

import fcntl
import os
import uuid
from pathlib import Path


class SlotLock:
    """The right to use one slot of this machine.

    The kernel holds it for the open file, which the trainers of the slot inherit. So it lasts until the supervisor and
    every trainer that it started are gone, however they went, and no longer.
    """

    def __init__(self, directory: Path, name: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{name}.lock"
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.identity = ""
        """What tells this lock file from those of all other machines and directories, once it was acquired."""

    def acquire(self) -> bool:
        """Whether the slot is ours now; never waits."""
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
        """Other processes on this machine that have the lock file open."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid() and self.is_open_in(int(entry.name)):
                found.append(int(entry.name))
        return found

    def is_open_in(self, pid: int) -> bool:
        """Whether a process has the lock file open; False of one that has ended, or is somebody else's."""
        try:
            return any(link.readlink() == self.path for link in Path(f"/proc/{pid}/fd").iterdir())
        except OSError:
            return False

    def close(self) -> None:
        os.close(self.descriptor)
