"""Disk space reserved for checkpoints before they are written."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

RESERVE_FILE = "ballast"
"""Name of the reserve in a job's checkpoint directory"""


class DiskReserve:
    """An allocated file that occupies disk space and releases it in parts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.wanted_bytes = 0
        """Bytes requested by `reserve` less those released by `shrink`, also when the disk had no room for them"""

    def reserve(self, size_bytes: int) -> None:
        """Reserves `size_bytes` in place of the former reserve.

        Free space is checked before allocation, because a failing allocation would fill the disk for other writers.

        Raises:
            OSError: too little free space (ENOSPC); nothing is reserved.
        """
        self.release()
        self.wanted_bytes = max(size_bytes, 0)
        if size_bytes <= 0:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if size_bytes > shutil.disk_usage(self._path.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        with self._path.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            except OSError:
                self.release()
                raise

    def shrink(self, by_bytes: int) -> None:
        """Releases `by_bytes`, or the rest if it is smaller."""
        self.wanted_bytes = max(self.wanted_bytes - by_bytes, 0)
        remaining = self.held_bytes - by_bytes
        if remaining > 0:
            os.truncate(self._path, remaining)
        else:
            self.release()

    def release(self) -> None:
        """Releases the whole reserve."""
        self._path.unlink(missing_ok=True)

    @property
    def held_bytes(self) -> int:
        """Bytes that the file occupies now."""
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0
