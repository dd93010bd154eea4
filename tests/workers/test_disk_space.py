"""Detection of a full disk, and the hold of a job."""

from __future__ import annotations

import errno

import pytest

from qlora_service.domain.jobs import HoldReason
from workers.disk_space import MIN_FREE_BYTES, disk_full_hold, is_disk_full


def test_a_full_disk_is_detected_in_the_context_of_a_later_error() -> None:
    def write() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise ValueError("the file is closed")

    with pytest.raises(ValueError, match="closed") as raised:
        write()
    assert raised.value.__cause__ is None
    assert is_disk_full(raised.value)


def test_a_job_waits_for_its_own_bytes_and_a_margin() -> None:
    hold = disk_full_hold(100 * 2**20)
    assert hold["reason"] == HoldReason.DISK_FULL
    assert hold["needs_bytes"] == 100 * 2**20 + MIN_FREE_BYTES
    assert "free 164 MiB" in hold["message"]


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EIO, "Input/output error"), False),
        (RuntimeError("Generic LocalFileSystem error: No space left on device (os error 28)"), True),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full"), True),
        (ValueError("odd"), False),
    ],
)
def test_a_full_disk_is_detected_whichever_library_raises_the_error(error: Exception, is_full: bool) -> None:
    assert is_disk_full(error) is is_full
    wrapped = RuntimeError("it did not work")
    wrapped.__cause__ = error
    assert is_disk_full(wrapped) is is_full
