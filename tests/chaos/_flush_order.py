"""Durability of an answer across a power cut, from the order of writes, flushes and renames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from tests.chaos._syscalls import ANSWERED, Call

SCRATCH = ("tmp/", "state.db-shm")
"""Paths that need not survive a power cut"""
DISCARDED = ("removed-", "bad-")
"""Name prefixes of checkpoints that are about to be removed"""


def unflushed_at_answer(calls: Sequence[Call]) -> list[str]:
    """Writes that a power cut right after the answer could undo, and renames of checkpoints that came too early.

    A file must be flushed after its last write, a directory after the last change of a name in it. A checkpoint gets
    its name after its files are flushed, and loses it after the name of its replacement is.
    """
    dirty_files: set[str] = set()
    dirty_directories: set[str] = set()
    early = []
    for call in calls[: calls.index(ANSWERED)]:
        path = call.paths[-1]
        if call.name in ("fsync", "fdatasync"):
            dirty_files.discard(path)
            dirty_directories.discard(path)
        elif "write" in call.name:
            dirty_files.add(path)
        elif call.name.startswith(("rename", "link", "mkdir")):
            source = call.paths[0]
            if PurePath(path).name.startswith("step-"):
                unflushed = sorted(dirty for dirty in dirty_files | dirty_directories if _is_in(dirty, source))
                early += [f"{dirty} was not flushed before {call}" for dirty in unflushed]
            if call.name.startswith("rename"):
                # The new name of a checkpoint that is about to be removed need not be durable.
                if PurePath(path).name.startswith(DISCARDED):
                    if str(PurePath(path).parent) in dirty_directories:
                        early.append(f"{PurePath(path).parent} was not flushed before {call}")
                    continue
                dirty_files = {_renamed(file, source, path) for file in dirty_files}
                dirty_directories = {_renamed(directory, source, path) for directory in dirty_directories}
            dirty_directories |= {str(PurePath(path).parent)} | ({path} if call.name.startswith("mkdir") else set())
        else:
            dirty_files = {file for file in dirty_files if not _is_in(file, path)}
            dirty_directories = {directory for directory in dirty_directories if not _is_in(directory, path)}
    late = [f"{path} was not flushed before the answer" for path in sorted(dirty_files | dirty_directories)]
    return early + [text for text in late if not text.startswith((*SCRATCH, "tmp "))]


def _is_in(path: str, directory: str) -> bool:
    return PurePath(path).is_relative_to(directory)


def _renamed(path: str, source: str, target: str) -> str:
    """The path after `source` was renamed to `target`."""
    return str(PurePath(target) / PurePath(path).relative_to(source)) if _is_in(path, source) else path
