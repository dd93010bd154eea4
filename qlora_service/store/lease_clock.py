"""The clock that leases are measured by. It must not jump: a wall clock that is set would lose every claim, or none.

SQLite lives on one host, so its leases are on the host's monotonic clock, which all its processes share and which
stands still while the host sleeps. PostgreSQL may serve several hosts: theirs are on the database's own clock.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

LeaseClock = Callable[[Connection], tuple[str, float]]
"""The clock's name and its time in seconds; times of clocks with other names mean nothing."""

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def lease_clock(connection: Connection) -> tuple[str, float]:
    """The clock that fits the connection's database."""
    if connection.dialect.name == "sqlite":
        return _boot(), time.monotonic()
    seconds = connection.execute(sa.select(sa.extract("epoch", sa.func.clock_timestamp()))).scalar_one()
    return "database", float(seconds)


@cache
def _boot() -> str:
    """What tells one start of the host from the next, with which the monotonic clock begins anew."""
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else socket.gethostname()
