"""Slot locks held by real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.workspace import ROOT
from workers.supervisor.slot_lock import SlotLock

HOLD = """
import sys
from pathlib import Path
from workers.supervisor.slot_lock import SlotLock
lock = SlotLock(Path(sys.argv[1]), "cpu-0")
print(lock.acquire(), flush=True)
sys.stdin.read()
"""


def holder(directory: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_one_process_at_a_time_holds_a_slot(tmp_path: Path) -> None:
    other = holder(tmp_path)
    lock = SlotLock(tmp_path, "cpu-0")
    assert not lock.acquire()
    assert lock.other_holders() == [other.pid]
    assert SlotLock(tmp_path, "cpu-1").acquire()
    end(other)
    assert lock.acquire()
    assert lock.acquire()  # a second call keeps the lock
    assert lock.other_holders() == []
    lock.close()


def test_a_trainer_holds_the_slot_after_its_supervisor_has_ended(tmp_path: Path) -> None:
    lock = SlotLock(tmp_path, "cpu-0")
    assert lock.acquire()
    trainer = subprocess.Popen(["sleep", "60"], pass_fds=[lock.descriptor])
    lock.close()
    second = SlotLock(tmp_path, "cpu-0")
    assert not second.acquire()
    trainer.kill()
    trainer.wait()
    assert second.acquire()
    second.close()


def test_a_lock_file_keeps_its_unique_identity(tmp_path: Path) -> None:
    first = SlotLock(tmp_path, "cpu-0")
    assert first.acquire()
    identity = first.identity
    first.close()
    second, other = SlotLock(tmp_path, "cpu-0"), SlotLock(tmp_path / "other", "cpu-0")
    assert second.acquire()
    assert other.acquire()
    assert second.identity == identity != other.identity
    second.close()
    other.close()
