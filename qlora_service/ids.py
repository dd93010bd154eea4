"""Typed, sortable identifiers."""

from __future__ import annotations

import secrets
import time


def new_id(kind: str) -> str:
    """A new id such as `job_019a9c2f8d31c4e55f0a7b`: milliseconds since 1970, then 40 random bits, in hex."""
    return f"{kind}_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(5)}"
