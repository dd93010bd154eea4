"""Detection of a full disk, and the hold of a job that it interrupted."""

from __future__ import annotations

import errno
from typing import Any

from qlora_service.domain.jobs import HoldReason

MIN_FREE_BYTES = 64 * 2**20
"""Free bytes, beyond what the job will write, before a job paused by a full disk resumes."""
_DISK_FULL_MESSAGES = ("no space left", "disk is full", "disk quota exceeded")


def is_disk_full(error: BaseException | None) -> bool:
    """Whether the error or one of its causes reports a full disk, whichever library raised it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(message in str(error).lower() for message in _DISK_FULL_MESSAGES):
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full_hold(job_bytes: int) -> dict[str, Any]:
    """The hold of a job that will write `job_bytes`: its reason, and the free bytes at which the job resumes."""
    needed = job_bytes + MIN_FREE_BYTES
    return {
        "reason": HoldReason.DISK_FULL,
        "message": f"the data disk is full: free {needed / 2**20:.0f} MiB on it, and the job resumes by itself",
        "needs_bytes": needed,
    }
