"""Counts of the kernel's out-of-memory kills, in this process's control group and on the host (Linux)."""

from __future__ import annotations

import re
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
VMSTAT = Path("/proc/vmstat")


def oom_kills() -> int:
    """Processes killed for lack of memory so far, in this control group and on the host; 0 without a counter.

    The sources are memory.events of cgroup v2, memory.oom_control of v1, and /proc/vmstat for the host as a whole
    (https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files).
    """
    return sum(_count(path) for path in [*_counters(), VMSTAT])


def _counters() -> list[Path]:
    """The counter files of this process's control groups, by their paths on the host and within a container."""
    try:
        memberships = OWN_CGROUP.read_text().splitlines()
    except OSError:
        return []
    counters = {CGROUP / "memory.events", CGROUP / "memory" / "memory.oom_control"}
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if not controllers:
            counters.add(CGROUP / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            counters.add(CGROUP / "memory" / path.lstrip("/") / "memory.oom_control")
    return sorted(counters)


def _count(path: Path) -> int:
    try:
        match = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) if match else 0
