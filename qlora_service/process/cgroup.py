"""Memory of this process's control group (cgroup v2)."""

from __future__ import annotations

from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def memory_limit() -> int | None:
    """Bytes that the control group may use; None without a limit."""
    return _bytes("memory.max")


def memory_used() -> int | None:
    """Bytes that the control group uses; None without one."""
    return _bytes("memory.current")


def _bytes(name: str) -> int | None:
    try:
        return int((CGROUP / name).read_text())
    except (OSError, ValueError):
        return None
