"""Reserved disk space: allocated, released in parts, and refused on a full disk."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from qlora_service.training.checkpoint.disk_reserve import DiskReserve

MIB = 2**20


def test_reserve_occupies_disk_blocks_and_releases_them_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "new" / "reserve"
    reserve = DiskReserve(path)
    assert reserve.held_bytes == 0
    reserve.reserve(3 * MIB)
    assert path.stat().st_blocks * 512 >= 3 * MIB
    reserve.shrink(MIB)
    assert path.stat().st_blocks * 512 <= 2 * MIB + 4096
    assert DiskReserve(path).held_bytes == reserve.wanted_bytes == 2 * MIB
    reserve.shrink(2 * MIB)
    assert not path.exists()
    reserve.shrink(MIB)
    reserve.release()


def test_reserving_again_replaces_the_former_reserve(tmp_path: Path) -> None:
    reserve = DiskReserve(tmp_path / "reserve")
    reserve.reserve(2 * MIB)
    reserve.reserve(MIB)
    assert reserve.held_bytes == MIB
    reserve.reserve(0)
    assert not (tmp_path / "reserve").exists()


def test_a_reserve_beyond_the_free_space_is_an_error_and_keeps_only_the_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda _file, _offset, size: allocated.append(size))
    reserve = DiskReserve(tmp_path / "reserve")
    size = 2 * shutil.disk_usage(tmp_path).free
    with pytest.raises(OSError, match="No space left"):
        reserve.reserve(size)
    assert allocated == []  # trying would fill the disk for other writers
    assert not (tmp_path / "reserve").exists()
    assert reserve.wanted_bytes == size


def test_a_failing_allocation_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(OSError, match="No space left"):
        DiskReserve(tmp_path / "reserve").reserve(MIB)
    assert not (tmp_path / "reserve").exists()
