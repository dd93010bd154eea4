"""A trainer's line to its supervisor, in a process of its own: a socket for stdin, as in the product."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qlora_service.chat.wire import address, listen
from qlora_service.models.base.needed_base import NeededBase
from qlora_service.queue.claim import Claim
from qlora_service.specs import Quantization
from qlora_service.store.inference import LoadedBase
from tests.workspace import ROOT
from workers import exit_codes
from workers.supervisor_channel import LEAVE, Attempt, ChatTurn

BASE = NeededBase("a" * 64, Quantization(type="fp4"))
FRAME = """
import socket, sys, time
from pathlib import Path
from qlora_service.models.base.needed_base import NeededBase
from workers.supervisor_channel import SupervisorLine

line = SupervisorLine(socket.socket(fileno=0))
line.start()
base = NeededBase.from_json(sys.argv[1])
print("listens", flush=True)
def where_it_stood():
    {work}
where_it_stood()
"""


@contextmanager
def trainer(work: str) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """A process that does `work` with its `line`, and the supervisor's end of that."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-c", FRAME.replace("{work}", work.replace("\n", "\n    ")), BASE.as_json()],
        cwd=ROOT,
        stdin=theirs.fileno(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    theirs.close()
    with ours, process:
        try:
            assert printed(process) == b"listens\n"
            yield process, ours
        finally:
            process.kill()


def printed(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


def test_assignments_are_taken_in_turn_however_their_bytes_arrive() -> None:
    logs = [Path(f"/logs/ä {token}.log") for token in (1, 2)]
    sent = b"".join(
        json.dumps({"job": "job_a", "token": token, "log": str(log)}).encode() + b"\n"
        for token, log in zip((1, 2), logs, strict=True)
    )
    with trainer("for _ in range(2): print(line.next_assignment(), flush=True)") as (process, line):
        for start in range(0, len(sent), 11):
            line.sendall(sent[start : start + 11])
            time.sleep(0.01)
        for token, log in zip((1, 2), logs, strict=True):
            assert printed(process).decode().strip() == str(Attempt(Claim("job_a", token), log))


def test_a_listener_goes_along_with_the_chats_it_is_for(tmp_path: Path) -> None:
    work = """line.next_assignment()
turn = line.next_assignment()
print(turn.base, flush=True)
connection, _ = turn.listener.accept()
connection.sendall(b"hello")"""
    base, path = LoadedBase("tiny", "{}"), tmp_path / "x.sock"
    with trainer(work) as (process, line):
        with listen(path) as listener:
            Attempt(Claim("job_a", 1), tmp_path / "a.log").send(line)
            ChatTurn(base, listener, tmp_path / "b.log").send(line)
        assert printed(process).decode().strip() == str(base)
        with socket.socket(socket.AF_UNIX) as client, address(path) as name:
            client.connect(name)
            assert client.recv(5) == b"hello"


@pytest.mark.parametrize("late_s", [0.0, 0.5])
def test_who_answers_chats_is_told_to_leave_also_before_it_has_begun(late_s: float) -> None:
    work = f"""time.sleep({late_s})
gone = []
with line.leaving_by(lambda: gone.append(1)):
    while not gone: time.sleep(0.01)
with line.leaving_by(lambda: gone.append(2)):
    time.sleep(0.1)
print(gone, flush=True)"""
    with trainer(work) as (process, line):
        line.sendall(LEAVE)
        assert printed(process) == b"[1]\n"  # what was said of these chats says nothing of the next


def test_supervisor_is_told_what_base_the_trainer_waits_with() -> None:
    with trainer("line.wait_with(base); time.sleep(60)") as (_, line):
        assert NeededBase.from_json(line.recv(1 << 16)) == BASE


@pytest.mark.parametrize("work", ["time.sleep(60)", "line.next_assignment()"])
def test_a_trainer_without_a_supervisor_ends(work: str) -> None:
    with trainer(work) as (process, line):
        line.close()
        assert process.wait(10) == exit_codes.SUPERVISOR_GONE


def test_an_outcome_is_written_also_when_the_supervisor_has_gone(tmp_path: Path) -> None:
    outcome = tmp_path / "outcome"
    work = f"""with line.finishing():
    print("finishing", flush=True)
    while not line._is_gone:
        time.sleep(0.01)
    time.sleep(0.2)
    Path({str(outcome)!r}).write_text("written")
time.sleep(60)"""
    with trainer(work) as (process, line):
        assert printed(process) == b"finishing\n"
        line.close()
        assert process.wait(10) == exit_codes.SUPERVISOR_GONE
    assert outcome.read_text() == "written"


def test_a_trainer_says_where_it_stands_when_asked() -> None:
    with trainer('print("stands", flush=True); time.sleep(60)') as (process, _):
        assert printed(process) == b"stands\n"
        os.kill(process.pid, signal.SIGUSR1)
        assert process.stderr is not None
        assert any(b"where_it_stood" in line for line in iter(process.stderr.readline, b""))
