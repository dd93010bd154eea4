from __future__ import annotations

import errno

import pytest

from qlora_service.domain.jobs import HoldReason
from workers.disk_space import LEAST_ROOM, disk_full_hold, is_disk_full


def test_a_full_disk_is_known_behind_the_error_of_whoever_cleaned_up_after_it() -> None:
    def write() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise ValueError("the file is closed")

    with pytest.raises(ValueError, match="closed") as raised:
        write()
    assert raised.value.__cause__ is None
    assert is_disk_full(raised.value)


def test_a_job_waits_for_its_own_room_and_some_more() -> None:
    hold = disk_full_hold(100 * 2**20)
    assert hold["reason"] == HoldReason.DISK_FULL
    assert hold["needs_bytes"] == 100 * 2**20 + LEAST_ROOM
    assert "free 164 MiB" in hold["message"]
