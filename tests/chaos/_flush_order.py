"""Whether what was answered would survive a power cut, by the order of the calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from tests.chaos._syscalls import ANSWERED, Call

SCRATCH = ("tmp/", "state.db-shm")
"""What need not survive a power cut."""
ASIDE = ("removed-", "bad-")


def unflushed_at_answer(calls: Sequence[Call]) -> list[str]:
    """What a power cut right after the answer could take away; checkpoints that had their name too early, or lost it
    before that of the one in their place was on the disk.

    A file has to be flushed after its last write, and a directory after a name in it was changed.
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
                torn = sorted(dirty for dirty in dirty_files | dirty_directories if _is_in(dirty, source))
                early += [f"{dirty} was not flushed before {call}" for dirty in torn]
            if call.name.startswith("rename"):
                # A checkpoint that is about to be removed need not have its new name for good.
                if PurePath(path).name.startswith(ASIDE):
                    if str(PurePath(path).parent) in dirty_directories:
                        early.append(f"{PurePath(path).parent} was not flushed before {call}")
                    continue
                dirty_files = {_moved(file, source, path) for file in dirty_files}
                dirty_directories = {_moved(directory, source, path) for directory in dirty_directories}
            dirty_directories |= {str(PurePath(path).parent)} | ({path} if call.name.startswith("mkdir") else set())
        else:
            dirty_files = {file for file in dirty_files if not _is_in(file, path)}
            dirty_directories = {directory for directory in dirty_directories if not _is_in(directory, path)}
    late = [f"{path} was not flushed before the answer" for path in sorted(dirty_files | dirty_directories)]
    return early + [text for text in late if not text.startswith((*SCRATCH, "tmp "))]


def _is_in(path: str, directory: str) -> bool:
    return PurePath(path).is_relative_to(directory)


def _moved(path: str, source: str, to: str) -> str:
    return str(PurePath(to) / PurePath(path).relative_to(source)) if _is_in(path, source) else path
