"""Staging directories: written under a hidden name, published by one rename, so visible complete or not at all.

All processes that write in a staging directory, conversions included, share its lock. The kernel releases the lock
when the last of them ends, so a staging directory that can be locked again is left from a crash.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qlora_service.process.fsync import flush

PREFIX = ".staging-"


@dataclass(frozen=True)
class Staging:
    """A locked staging directory; every child process that writes in it must inherit `lock_fd`."""

    path: Path
    lock_fd: int

    def publish(self, target: Path) -> None:
        """Flushes all files to disk, then renames the directory to `target`.

        Raises:
            FileExistsError: `target` exists already.
        """
        for file in self.path.iterdir():
            file.chmod(0o644)  # transformers makes weights readable by their owner only
            flush(file)
        flush(self.path)
        try:
            self.path.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise FileExistsError(errno.EEXIST, "exists already", str(target)) from None
            raise
        flush(target.parent)


@contextmanager
def staging_directory(parent: Path) -> Iterator[Staging]:
    """An empty locked directory inside `parent`, deleted at the end unless it was published."""
    parent.mkdir(parents=True, exist_ok=True)
    staging = _create(parent)
    try:
        yield staging
    finally:
        shutil.rmtree(staging.path, ignore_errors=True)
        os.close(staging.lock_fd)


def reap_stale(parent: Path) -> None:
    """Deletes the staging directories of processes that have ended."""
    for path in parent.glob(f"{PREFIX}*"):
        try:
            lock_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # published or reaped by another process
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(lock_fd)


def discard(directory: Path) -> None:
    """Removes a published directory: first hides it by a rename, then deletes its files."""
    hidden = directory.with_name(f"{PREFIX}{secrets.token_hex(8)}")
    directory.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)  # an import may delete it at the same time


def _create(parent: Path) -> Staging:
    while True:
        path = parent / f"{PREFIX}{secrets.token_hex(8)}"
        path.mkdir()
        try:
            lock_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # reaped between mkdir and open
        fcntl.flock(lock_fd, fcntl.LOCK_EX)
        if path.exists():
            return Staging(path, lock_fd)
        os.close(lock_fd)  # reaped between open and lock
