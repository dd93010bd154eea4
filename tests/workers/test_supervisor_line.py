"""A trainer's line to its supervisor, in a process of its own: stdin and a pipe, as in the product."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qlora_service.models.needed_base import NeededBase
from qlora_service.queue import Claim
from qlora_service.specs import Quantization
from tests.workspace import ROOT
from workers import exit_codes
from workers.supervisor_line import Assignment

BASE = NeededBase("a" * 64, Quantization(type="fp4"))
FRAME = """
import sys, time
from pathlib import Path
from qlora_service.models.needed_base import NeededBase
from workers.supervisor_line import SupervisorLine

line = SupervisorLine(int(sys.argv[1]))
line.start()
base = NeededBase.from_json(sys.argv[2])
print("listens", flush=True)
{work}
"""


@contextmanager
def trainer(work: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process that does `work` with its `line`, and the descriptor of what it reports."""
    reports, report = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", FRAME.replace("{work}", work), str(report), BASE.as_json()],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[report],
        bufsize=0,
    )
    os.close(report)
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"listens\n"
            yield process, reports
        finally:
            process.kill()
            os.close(reports)


def test_assignments_are_taken_in_turn_however_their_bytes_arrive() -> None:
    first, second = (Assignment(Claim("job_a", token), Path(f"/logs/ä {token}.log")) for token in (1, 2))
    sent = b"".join(assignment.as_json().encode() + b"\n" for assignment in (first, second))
    with trainer("for _ in range(2): print(line.next_assignment().as_json(), flush=True)") as (process, _):
        assert process.stdin is not None
        assert process.stdout is not None
        for start in range(0, len(sent), 11):
            process.stdin.write(sent[start : start + 11])
            time.sleep(0.01)
        assert [Assignment.from_json(process.stdout.readline()) for _ in range(2)] == [first, second]


def test_supervisor_is_told_what_base_the_trainer_waits_with() -> None:
    with trainer("line.wait_with(base); time.sleep(60)") as (_, reports):
        assert NeededBase.from_json(os.read(reports, 1 << 16)) == BASE


@pytest.mark.parametrize("work", ["time.sleep(60)", "line.next_assignment()"])
def test_a_trainer_without_a_supervisor_ends(work: str) -> None:
    with trainer(work) as (process, _):
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == exit_codes.SUPERVISOR_GONE


def test_an_outcome_is_written_also_when_the_supervisor_has_gone(tmp_path: Path) -> None:
    outcome = tmp_path / "outcome"
    work = f"""
with line.finishing():
    print("finishing", flush=True)
    sys.stdout.flush()
    while not line._is_gone:
        time.sleep(0.01)
    time.sleep(0.2)
    Path({str(outcome)!r}).write_text("written")
time.sleep(60)
"""
    with trainer(work) as (process, _):
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"finishing\n"
        process.stdin.close()
        assert process.wait(10) == exit_codes.SUPERVISOR_GONE
    assert outcome.read_text() == "written"
