"""A sample of the crash points, all renames among them; `python -m tests.chaos.crash_points` tries every one."""

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
# In processes of their own, for one with threads cannot be forked safely.
SAMPLED = f"""
from tests.chaos.crash_points import run, why_not
result = why_not() or run({SAMPLE}, seed=0)
"""
WATCHED = """
import os, tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tests.chaos._syscalls import Fault, watch, why_not

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
            ended = watch(act, directory, fault, at)
            left = {path.name: path.read_text() for path in sorted(directory.iterdir())}
            yield f"{fault} {at}", [ended.hit and ended.hit.name, ended.answer, ended.error, ended.killed, left]

with tempfile.TemporaryDirectory() as made:
    directory = Path(made)
    result = why_not() or dict(runs())
"""


def result_of(script: str) -> Any:
    """What the script's `result` is, when it was run by itself; a text is a reason to skip."""
    script += "\nimport json\nprint(json.dumps(result))"
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, timeout=240, check=False
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    if isinstance(result, str):
        pytest.skip(result)
    return result


@pytest.fixture(scope="module")
def sampled() -> dict[str, Any]:
    found: dict[str, Any] = result_of(SAMPLED)
    return found


def test_no_crash_and_no_failing_call_leaves_half_of_anything(sampled: dict[str, Any]) -> None:
    assert sampled["violations"] == []
    for scenario, tried in sampled["points"].items():
        renames = sum(count for name, count in sampled["calls"][scenario].items() if name.startswith("rename"))
        for fault, points in tried.items():
            assert points > (0 if fault == "full disk" else renames), f"{scenario} was hardly disturbed by {fault}"


def test_what_is_answered_is_on_the_disk_and_a_checkpoint_has_its_name_last(sampled: dict[str, Any]) -> None:
    assert sampled["unflushed"] == []
    # Otherwise nothing was looked at.
    assert sampled["calls"]["submit"]["fdatasync"] >= 2
    assert sampled["calls"]["checkpoint"]["fsync"] >= 8
    assert sampled["calls"]["publish"]["rename"] >= 8


WRITE, FSYNC = Call("write", ("new/a",)), Call("fsync", ("new/a",))
NAMES, RENAME, NAME = Call("fsync", ("new",)), Call("rename", ("new", "step-1")), Call("fsync", (".",))
REMOVE = Call("rename", ("step-0", "removed-step-0"))


def test_flushed_in_order_is_on_the_disk() -> None:
    assert unflushed_at_answer([Call("mkdir", ("new",)), WRITE, FSYNC, NAMES, RENAME, NAME, ANSWERED]) == []
    assert unflushed_at_answer([Call("mkdir", ("new",)), WRITE, FSYNC, NAMES, RENAME, NAME, REMOVE, ANSWERED]) == []
    assert unflushed_at_answer([Call("pwrite64", ("wal",)), Call("fdatasync", ("wal",)), ANSWERED]) == []
    assert unflushed_at_answer([Call("write", ("tmp/upload",)), ANSWERED]) == []


@pytest.mark.parametrize(("calls", "noticed"), [
    ([WRITE, NAMES, RENAME, NAME], ["new/a was not flushed before rename", "step-1/a was not flushed before the ans"]),
    ([WRITE, FSYNC, RENAME, NAME], ["new was not flushed before rename", "step-1 was not flushed before the answer"]),
    ([WRITE, FSYNC, NAMES, RENAME], [". was not flushed before the answer"]),
    ([WRITE, NAMES, RENAME, Call("fsync", ("step-1/a",)), NAME], ["new/a was not flushed before rename"]),
    ([WRITE, FSYNC, WRITE, NAMES], [". was not", "new/a was not flushed before the answer"]),
    ([NAMES, NAME, Call("pwrite64", ("wal",))], ["wal was not flushed before the answer"]),
    ([WRITE, FSYNC, NAMES, RENAME, REMOVE, NAME], [". was not flushed before rename(step-0, removed-step-0)"]),
], ids=["file", "names in it", "its name", "too late", "written again", "commit", "removed"])  # fmt: skip
def test_a_missing_flush_is_noticed(calls: list[Call], noticed: list[str]) -> None:
    found = unflushed_at_answer([Call("mkdir", ("new",)), *calls, ANSWERED])
    assert len(found) == len(noticed)
    assert all(text.startswith(start) for text, start in zip(found, noticed, strict=True))


def test_a_fault_befalls_the_call_it_is_meant_for_in_whichever_thread() -> None:
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
