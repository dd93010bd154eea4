"""Freed memory stays with the process: measured in a process of its own, because it cannot be undone."""

from __future__ import annotations

import subprocess
import sys

import pytest

PAGE_FAULTS = """
import resource, sys
from workers.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
import torch
def touch():
    for _ in range(20):
        torch.ones(16 << 20)  # 64 MiB each
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    command = [sys.executable, "-c", PAGE_FAULTS, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_buffers_that_are_made_again_cost_no_page_faults() -> None:
    given_back, kept = page_faults("given back"), page_faults("kept")
    assert given_back > 20 * 1000  # 16,384 small pages each, or fewer huge ones
    assert kept < given_back / 20
