"""The channel between trainer and supervisor, with the trainer's end in a real process: its stdin is the socket."""

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
from workers.supervisor_channel import YIELD_SLOT, Attempt, ChatTurn

BASE = NeededBase("a" * 64, Quantization(type="fp4"))
FRAME = """
import socket, sys, time
from pathlib import Path
from qlora_service.models.base.needed_base import NeededBase
from workers.supervisor_channel import SupervisorChannel

channel = SupervisorChannel(socket.socket(fileno=0))
channel.start()
base = NeededBase.from_json(sys.argv[1])
print("listens", flush=True)
def current_work():
    {work}
current_work()
"""


@contextmanager
def trainer(work: str) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """A process that does `work` with its `channel`, and the supervisor's end of the channel."""
    parent_end, child_end = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-c", FRAME.replace("{work}", work.replace("\n", "\n    ")), BASE.as_json()],
        cwd=ROOT,
        stdin=child_end.fileno(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    child_end.close()
    with parent_end, process:
        try:
            assert printed(process) == b"listens\n"
            yield process, parent_end
        finally:
            process.kill()


def printed(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


def test_assignments_arrive_in_order_however_their_bytes_are_split() -> None:
    logs = [Path(f"/logs/ä {token}.log") for token in (1, 2)]
    sent = b"".join(
        json.dumps({"job": "job_a", "token": token, "log": str(log)}).encode() + b"\n"
        for token, log in zip((1, 2), logs, strict=True)
    )
    with trainer("for _ in range(2): print(channel.next_assignment(), flush=True)") as (process, channel):
        for start in range(0, len(sent), 11):
            channel.sendall(sent[start : start + 11])
            time.sleep(0.01)
        for token, log in zip((1, 2), logs, strict=True):
            assert printed(process).decode().strip() == str(Attempt(Claim("job_a", token), log))


def test_a_listener_arrives_with_its_chat_turn(tmp_path: Path) -> None:
    work = """channel.next_assignment()
turn = channel.next_assignment()
print(turn.base, flush=True)
connection, _ = turn.listener.accept()
connection.sendall(b"hello")"""
    base, path = LoadedBase("tiny", "{}"), tmp_path / "x.sock"
    with trainer(work) as (process, channel):
        with listen(path) as listener:
            Attempt(Claim("job_a", 1), tmp_path / "a.log").send(channel)
            ChatTurn(base, listener, tmp_path / "b.log").send(channel)
        assert printed(process).decode().strip() == str(base)
        with socket.socket(socket.AF_UNIX) as client, address(path) as name:
            client.connect(name)
            assert client.recv(5) == b"hello"


@pytest.mark.parametrize("delay_s", [0.0, 0.5])
def test_a_yield_request_reaches_the_chats_also_before_they_begin(delay_s: float) -> None:
    work = f"""time.sleep({delay_s})
yielded = []
with channel.on_yield_request(lambda: yielded.append(1)):
    while not yielded: time.sleep(0.01)
with channel.on_yield_request(lambda: yielded.append(2)):
    time.sleep(0.1)
print(yielded, flush=True)"""
    with trainer(work) as (process, channel):
        channel.sendall(YIELD_SLOT)
        assert printed(process) == b"[1]\n"  # the request holds for these chats only


def test_idle_trainer_reports_its_base() -> None:
    with trainer("channel.report_idle(base); time.sleep(60)") as (_, channel):
        assert NeededBase.from_json(channel.recv(1 << 16)) == BASE


@pytest.mark.parametrize("work", ["time.sleep(60)", "channel.next_assignment()"])
def test_a_trainer_without_a_supervisor_ends(work: str) -> None:
    with trainer(work) as (process, channel):
        channel.close()
        assert process.wait(10) == exit_codes.SUPERVISOR_GONE


def test_an_outcome_is_written_after_the_supervisor_has_ended(tmp_path: Path) -> None:
    outcome = tmp_path / "outcome"
    work = f"""with channel.finishing():
    print("finishing", flush=True)
    while not channel._is_closed:
        time.sleep(0.01)
    time.sleep(0.2)
    Path({str(outcome)!r}).write_text("written")
time.sleep(60)"""
    with trainer(work) as (process, channel):
        assert printed(process) == b"finishing\n"
        channel.close()
        assert process.wait(10) == exit_codes.SUPERVISOR_GONE
    assert outcome.read_text() == "written"


def test_a_trainer_prints_its_stacks_on_sigusr1() -> None:
    with trainer('print("running", flush=True); time.sleep(60)') as (process, _):
        assert printed(process) == b"running\n"
        os.kill(process.pid, signal.SIGUSR1)
        assert process.stderr is not None
        assert any(b"current_work" in line for line in iter(process.stderr.readline, b""))
