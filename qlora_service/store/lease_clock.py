"""The clock of leases. It must not jump, as a wall clock does when it is set.

SQLite: the host's monotonic clock, shared by all processes and stopped while the host sleeps. PostgreSQL, which may
serve several hosts: the database's own clock.
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
"""The clock's name and its time in seconds; times of clocks with different names are not comparable"""

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def lease_clock(connection: Connection) -> tuple[str, float]:
    """The lease clock of the connection's database."""
    if connection.dialect.name == "sqlite":
        return _boot(), time.monotonic()
    seconds = connection.execute(sa.select(sa.extract("epoch", sa.func.clock_timestamp()))).scalar_one()
    return "database", float(seconds)


@cache
def _boot() -> str:
    """An identifier of the host's boot, at which the monotonic clock restarts."""
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else socket.gethostname()
