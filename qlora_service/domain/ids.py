"""Typed, sortable identifiers."""

from __future__ import annotations

import secrets
import threading
import time

RANDOM_BITS = 40

_lock = threading.Lock()
_newest = 0


def new_id(kind: str) -> str:
    """A new id such as `job_019a9c2f8d31c4e55f0a7b`: milliseconds since 1970, then 40 random bits, in hex.

    Ids of one process increase, also within a millisecond, so that sorting by id is sorting by age.
    """
    global _newest  # noqa: PLW0603 - one sequence per process
    with _lock:
        now = time.time_ns() // 1_000_000 << RANDOM_BITS | secrets.randbits(RANDOM_BITS)
        _newest = now if now > _newest else _newest + 1
        return f"{kind}_{_newest:022x}"
