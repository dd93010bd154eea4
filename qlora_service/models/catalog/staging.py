"""Directories that become visible whole or not at all.

A staging directory is locked by whoever writes in it, the conversion process included. The kernel drops the
lock when the last of them dies, so one that can be locked again is a crash's remainder.
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
    """A directory of ours; `lock_fd` is to be inherited by every child process that writes in it."""

    path: Path
    lock_fd: int

    def publish(self, target: Path) -> None:
        """Makes everything durable, then visible at `target` in one step.

        Raises:
            FileExistsError: `target` is there already.
        """
        for file in self.path.iterdir():
            file.chmod(0o644)  # transformers writes weights readable by their owner only
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
    """An empty locked directory inside `parent`, gone at the end unless it was published."""
    parent.mkdir(parents=True, exist_ok=True)
    staging = _create(parent)
    try:
        yield staging
    finally:
        shutil.rmtree(staging.path, ignore_errors=True)
        os.close(staging.lock_fd)


def reap_stale(parent: Path) -> None:
    """Deletes the staging directories that nobody writes in any more."""
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
    """Removes a published directory; it is invisible before its first file is gone."""
    hidden = directory.with_name(f"{PREFIX}{secrets.token_hex(8)}")
    directory.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)  # an import may reap it at the same time


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
