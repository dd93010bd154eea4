"""A sample of the crash points with all renames; `python -m tests.chaos.crash_points` tries every one."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.chaos._flush_order import unflushed_at_answer
from tests.chaos._syscalls import ANSWERED, Call
from tests.control_plane import REPOSITORY

SAMPLE = 0.03
# Run in processes of their own: one with threads cannot be forked safely.
SAMPLED = f"""
from tests.chaos.crash_points import run, why_unsupported
result = why_unsupported() or run({SAMPLE}, seed=0)
"""
WATCHED = """
import os, tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tests.chaos._syscalls import Fault, watch, why_unsupported

def act(answer):
    os.write(os.open(directory / "a", os.O_WRONLY | os.O_CREAT), b"first")
    b = os.open(directory / "b", os.O_WRONLY | os.O_CREAT)
    ThreadPoolExecutor(1).submit(os.write, b, b"second").result()
    answer("both")
    (directory / "a").rename(directory / "c")

def runs():
    yield "undisturbed", [str(call) for call in watch(act, directory).calls]
    for fault in Fault:
        for at in (1, 2, 3):
            for path in directory.iterdir():
                path.unlink()
            run = watch(act, directory, fault, at)
            left = {path.name: path.read_text() for path in sorted(directory.iterdir())}
            yield f"{fault} {at}", [run.hit and run.hit.name, run.answer, run.error, run.killed, left]

with tempfile.TemporaryDirectory() as name:
    directory = Path(name)
    result = why_unsupported() or dict(runs())
"""


def result_of(script: str) -> Any:
    """The value of `result` after the script has run in a process of its own; skips if it is a string, the reason."""
    script += "\nimport json\nprint(json.dumps(result))"
    completed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, timeout=240, check=False
    )
    assert completed.returncode == 0, completed.stderr
    result = json.loads(completed.stdout)
    if isinstance(result, str):
        pytest.skip(result)
    return result


@pytest.fixture(scope="module")
def sampled() -> dict[str, Any]:
    outcome: dict[str, Any] = result_of(SAMPLED)
    return outcome


def test_no_crash_and_no_failing_call_leaves_a_partial_state(sampled: dict[str, Any]) -> None:
    assert sampled["violations"] == []
    for scenario, tried in sampled["points"].items():
        renames = sum(count for name, count in sampled["calls"][scenario].items() if name.startswith("rename"))
        for fault, points in tried.items():
            assert points > (0 if fault == "full disk" else renames), f"too few points of {fault} in {scenario}"


def test_answers_are_durable_and_checkpoints_are_named_last(sampled: dict[str, Any]) -> None:
    assert sampled["unflushed"] == []
    # Otherwise nothing was checked.
    assert sampled["calls"]["submit"]["fdatasync"] >= 2
    assert sampled["calls"]["checkpoint"]["fsync"] >= 8
    assert sampled["calls"]["publish"]["rename"] >= 8


WRITE, FSYNC = Call("write", ("new/a",)), Call("fsync", ("new/a",))
NAMES, RENAME, NAME = Call("fsync", ("new",)), Call("rename", ("new", "step-1")), Call("fsync", (".",))
REMOVE = Call("rename", ("step-0", "removed-step-0"))


def test_flushes_in_order_are_durable() -> None:
    assert unflushed_at_answer([Call("mkdir", ("new",)), WRITE, FSYNC, NAMES, RENAME, NAME, ANSWERED]) == []
    assert unflushed_at_answer([Call("mkdir", ("new",)), WRITE, FSYNC, NAMES, RENAME, NAME, REMOVE, ANSWERED]) == []
    assert unflushed_at_answer([Call("pwrite64", ("wal",)), Call("fdatasync", ("wal",)), ANSWERED]) == []
    assert unflushed_at_answer([Call("write", ("tmp/upload",)), ANSWERED]) == []


@pytest.mark.parametrize(("calls", "expected"), [
    ([WRITE, NAMES, RENAME, NAME], ["new/a was not flushed before rename", "step-1/a was not flushed before the ans"]),
    ([WRITE, FSYNC, RENAME, NAME], ["new was not flushed before rename", "step-1 was not flushed before the answer"]),
    ([WRITE, FSYNC, NAMES, RENAME], [". was not flushed before the answer"]),
    ([WRITE, NAMES, RENAME, Call("fsync", ("step-1/a",)), NAME], ["new/a was not flushed before rename"]),
    ([WRITE, FSYNC, WRITE, NAMES], [". was not", "new/a was not flushed before the answer"]),
    ([NAMES, NAME, Call("pwrite64", ("wal",))], ["wal was not flushed before the answer"]),
    ([WRITE, FSYNC, NAMES, RENAME, REMOVE, NAME], [". was not flushed before rename(step-0, removed-step-0)"]),
], ids=["file", "names in it", "its name", "too late", "written again", "commit", "removed"])  # fmt: skip
def test_a_missing_flush_is_reported(calls: list[Call], expected: list[str]) -> None:
    reports = unflushed_at_answer([Call("mkdir", ("new",)), *calls, ANSWERED])
    assert len(reports) == len(expected)
    assert all(text.startswith(start) for text, start in zip(reports, expected, strict=True))


def test_a_fault_hits_its_call_in_any_thread() -> None:
    runs = result_of(WATCHED)
    assert runs.pop("undisturbed") == ["write(a)", "write(b)", "answer()", "rename(a, c)"]
    full, broken = "OSError: [Errno 28] No space left on device", "OSError: [Errno 5] Input/output error"
    assert runs == {
        "kill 1": ["write", None, None, True, {"a": ""}],
        "kill 2": ["write", None, None, True, {"a": "first", "b": ""}],
        "kill 3": ["rename", "both", None, False, {"a": "first", "b": "second"}],
        "ENOSPC 1": ["write", None, full, False, {"a": ""}],
        "ENOSPC 2": ["write", None, full, False, {"a": "first", "b": ""}],
        "ENOSPC 3": ["rename", "both", None, False, {"a": "first", "b": "second"}],
        "EIO 1": ["write", None, broken, False, {"a": ""}],
        "EIO 2": ["write", None, broken, False, {"a": "first", "b": ""}],
        "EIO 3": ["rename", "both", None, False, {"a": "first", "b": "second"}],
        "full disk 1": ["write", None, full, False, {"a": ""}],
        "full disk 2": ["write", None, full, False, {"a": "first", "b": ""}],
        "full disk 3": [None, "both", None, False, {"b": "second", "c": "first"}],
    }
