"""A disk without room: how it looks, and what a job that met one waits for."""

from __future__ import annotations

import errno
from typing import Any

from qlora_service.domain.jobs import HoldReason

LEAST_ROOM = 64 * 2**20
"""Bytes that have to be free, beside those the job will take, before one that found the disk full goes on."""
_SIGNS = ("no space left", "disk is full", "disk quota exceeded")


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, came of a disk without room, whichever library met it first."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(sign in str(error).lower() for sign in _SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full_hold(wanted_bytes: int) -> dict[str, Any]:
    """Why the job waits, and how many bytes have to be free before it goes on; it will take `wanted_bytes`."""
    needed = wanted_bytes + LEAST_ROOM
    return {
        "reason": HoldReason.DISK_FULL,
        "message": f"the data disk is full: free {needed / 2**20:.0f} MiB on it, and the job goes on by itself",
        "needs_bytes": needed,
    }
