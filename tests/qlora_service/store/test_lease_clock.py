from __future__ import annotations

import time
from pathlib import Path

import sqlalchemy as sa

from qlora_service.store.database import Database
from qlora_service.store.lease_clock import BOOT_ID, lease_clock


def test_leases_in_sqlite_are_on_the_monotonic_clock_of_this_boot(tmp_path: Path) -> None:
    """The wall clock is seconds since 1970, the monotonic one since the host started."""
    database = Database(f"sqlite:///{tmp_path / 'state.db'}")
    with database.read() as connection:
        before = time.monotonic()
        name, now = lease_clock(connection)
        assert before <= now <= time.monotonic()
    database.close()
    assert name == BOOT_ID.read_text().strip()


def test_leases_in_postgresql_are_on_its_clock_which_advances_within_a_transaction(postgres_url: str) -> None:
    database = Database(postgres_url)
    with database.write() as connection:
        names, times = set(), []
        for _ in range(3):
            times.append(
                float(connection.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())
            )
            name, now = lease_clock(connection)
            names.add(name)
            times.append(now)
    database.close()
    assert names == {"database"}
    assert times == sorted(times)
    assert len(set(times)) == len(times)
