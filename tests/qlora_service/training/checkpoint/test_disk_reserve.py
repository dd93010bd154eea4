from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from qlora_service.training.checkpoint.disk_reserve import DiskReserve

MIB = 2**20


def test_ballast_takes_up_blocks_of_the_disk_and_gives_them_up_piece_by_piece(tmp_path: Path) -> None:
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


def test_reserving_again_replaces_what_was_held(tmp_path: Path) -> None:
    reserve = DiskReserve(tmp_path / "reserve")
    reserve.reserve(2 * MIB)
    reserve.reserve(MIB)
    assert reserve.held_bytes == MIB
    reserve.reserve(0)
    assert not (tmp_path / "reserve").exists()


def test_more_than_the_disk_has_is_an_error_and_nothing_is_held_but_what_is_wanted_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda _file, _offset, size: taken.append(size))
    reserve = DiskReserve(tmp_path / "reserve")
    wanted = 2 * shutil.disk_usage(tmp_path).free
    with pytest.raises(OSError, match="No space left"):
        reserve.reserve(wanted)
    assert taken == []  # to fill the disk in order to find out would take the room from others
    assert not (tmp_path / "reserve").exists()
    assert reserve.wanted_bytes == wanted


def test_room_that_others_take_meanwhile_is_an_error_and_nothing_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken_by_others(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", taken_by_others)
    with pytest.raises(OSError, match="No space left"):
        DiskReserve(tmp_path / "reserve").reserve(MIB)
    assert not (tmp_path / "reserve").exists()
