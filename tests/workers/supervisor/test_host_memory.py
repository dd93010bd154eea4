"""Counts of out-of-memory kills, from the files of cgroup v1, cgroup v2 and /proc/vmstat."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.supervisor import host_memory


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernel's files, as a directory that the test fills."""
    for name in ("CGROUP", "OWN_CGROUP", "VMSTAT"):
        monkeypatch.setattr(host_memory, name, tmp_path / name)
    (tmp_path / "CGROUP").mkdir()
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_kills_of_the_own_group_and_of_the_host_are_added(kernel: Path) -> None:
    write(kernel / "OWN_CGROUP", "0::/a/b\n")
    write(kernel / "CGROUP/a/b/memory.events", "low 0\noom 9\noom_kill 2\noom_group_kill 5\n")
    write(kernel / "VMSTAT", "nr_free_pages 7\noom_kill 3\n")
    assert host_memory.oom_kills() == 5


def test_within_a_container_the_counter_is_in_the_root(kernel: Path) -> None:
    write(kernel / "OWN_CGROUP", "0::/\n")
    write(kernel / "CGROUP/memory.events", "oom_kill 4\n")
    assert host_memory.oom_kills() == 4


def test_cgroup_v1_has_its_own_counter_file(kernel: Path) -> None:
    write(kernel / "OWN_CGROUP", "5:cpu,cpuacct:/x\n4:memory:/x\n")
    write(kernel / "CGROUP/memory/x/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    assert host_memory.oom_kills() == 1


def test_without_a_counter_the_count_is_zero(kernel: Path) -> None:
    assert host_memory.oom_kills() == 0


def test_count_on_this_machine_is_not_negative() -> None:
    assert host_memory.oom_kills() >= 0
