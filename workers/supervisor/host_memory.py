"""Whether the kernel killed processes because the host's memory, or the container's, ran out (Linux)."""

from __future__ import annotations

import re
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
VMSTAT = Path("/proc/vmstat")


def oom_kills() -> int:
    """How many processes were killed so, in this control group and on the host; 0 where nobody counts.

    The sources are memory.events of cgroup v2, memory.oom_control of v1, and /proc/vmstat for the host as a whole
    (https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files).
    """
    return sum(_count(path) for path in [*_counters(), VMSTAT])


def _counters() -> list[Path]:
    """The counters of the control groups that this process is in; of a container, also as seen from within."""
    try:
        memberships = OWN_CGROUP.read_text().splitlines()
    except OSError:
        return []
    found = {CGROUP / "memory.events", CGROUP / "memory" / "memory.oom_control"}
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if not controllers:
            found.add(CGROUP / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            found.add(CGROUP / "memory" / path.lstrip("/") / "memory.oom_control")
    return sorted(found)


def _count(path: Path) -> int:
    try:
        match = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) if match else 0
