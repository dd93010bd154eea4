"""Disk space that is held for checkpoints before there are any."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path


class Ballast:
    """A file that takes up the space, and gives it up piece by piece."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.wanted_bytes = 0
        """What was asked for and not given up piece by piece, also where there was no room for it."""

    def reserve(self, size_bytes: int) -> None:
        """Hold so many bytes, whatever was held before.

        The room is looked for first: to find out by taking all there is would leave others none meanwhile.

        Raises:
            OSError: ENOSPC, there is not so much room; nothing is held then.
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
        """Give up so many bytes, or what is left."""
        self.wanted_bytes = max(self.wanted_bytes - by_bytes, 0)
        left = self.held_bytes - by_bytes
        if left > 0:
            os.truncate(self._path, left)
        else:
            self.release()

    def release(self) -> None:
        """Give up everything."""
        self._path.unlink(missing_ok=True)

    @property
    def held_bytes(self) -> int:
        """Bytes that are held."""
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0
