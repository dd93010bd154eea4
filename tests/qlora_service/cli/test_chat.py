"""`qlora chat` against a running API, answered by the echo of `tests.chat_process`."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qlora_service.cli.exit_codes import ExitCode
from tests.chat_process import BROKEN_OFF, ENDLESS, TOO_LONG, EchoProcess
from tests.running_api import ROOT, RunningApi


@pytest.fixture
def echo(api: RunningApi, tmp_path: Path) -> Iterator[EchoProcess]:
    with EchoProcess(f"sqlite:///{api.data_dir / 'state.db'}", tmp_path / "inference") as echo:
        yield echo


@contextmanager
def conversation(api: RunningApi, model: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`qlora chat` without a question: the process, and our end of its terminal."""
    ours, theirs = pty.openpty()
    process = start(api, model, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        read_until(ours, "> ")
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def start(api: RunningApi, *arguments: str, **pipes: Any) -> subprocess.Popen[bytes]:
    """`qlora chat` in a process of its own."""
    command = [sys.executable, "-m", "qlora_service.cli", "chat", "--url", api.url, *arguments]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)


def read_until(terminal: int, wanted: str) -> str:
    """What is printed on the terminal up to `wanted`."""
    printed, deadline = "", time.monotonic() + 20
    while wanted not in printed:
        assert time.monotonic() < deadline, printed
        printed += os.read(terminal, 1000).decode()
    return printed


def test_the_answer_is_all_of_stdout(run: Any, echo: EchoProcess) -> None:
    outcome = run("chat", "tiny", "Say it again.", "--system", "Be brief.", "--max-tokens", 5, "--temperature", 0)
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, "Say it again.\n", "")
    assert echo.received[-1].messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say it again."},
    ]
    assert (echo.received[-1].sampling.max_tokens, echo.received[-1].sampling.temperature) == (5, 0.0)


def test_a_question_can_be_piped_in(run: Any, echo: EchoProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert run("chat", "tiny").stdout == "from a pipe\n"


def test_json_has_the_whole_answer(run: Any, echo: EchoProcess) -> None:
    printed = json.loads(run("chat", "tiny", "one two", "--json").stdout)
    assert printed == {"model": "tiny", "content": "one two", "complete": True}


@pytest.mark.parametrize(
    ("model", "message", "code", "said"),
    [
        ("nobody", "hello", ExitCode.REFUSED, "there is no model 'nobody'"),
        ("tiny", TOO_LONG, ExitCode.REFUSED, "room for 8 tokens"),
        ("tiny", BROKEN_OFF, ExitCode.UNREACHABLE, "has ended"),
    ],
)
def test_a_refusal_is_one_message(
    run: Any, echo: EchoProcess, model: str, message: str, code: ExitCode, said: str
) -> None:
    outcome = run("chat", model, message)
    assert outcome.code == code
    assert outcome.stderr.startswith("error: ")
    assert said in outcome.stderr


def test_ctrl_c_ends_the_answer_where_it_is_made(api: RunningApi, echo: EchoProcess) -> None:
    process = start(api, "tiny", ENDLESS, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.read(len(ENDLESS)) == ENDLESS.encode()
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(20) == ExitCode.INTERRUPTED
    assert echo.client_gone.wait(10)


def test_a_conversation_remembers_and_goes_on_after_a_refusal(api: RunningApi, echo: EchoProcess) -> None:
    with conversation(api, "tiny") as (process, terminal):
        for question, answer in (("one", "one\r\n> "), (TOO_LONG, "room for 8 tokens"), ("two", "two\r\n> ")):
            os.write(terminal, f"{question}\n".encode())
            read_until(terminal, f"{question}\r\n")  # the terminal's own echo
            read_until(terminal, answer)
        os.write(terminal, b"\x04")
        assert process.wait(20) == 0
    assert [message["content"] for message in echo.received[-1].messages or []] == ["one", "one", "two"]


def test_a_conversation_with_a_model_that_is_not_there_is_over(api: RunningApi) -> None:
    with conversation(api, "nobody") as (process, terminal):
        os.write(terminal, b"hello\n")
        read_until(terminal, "there is no model 'nobody'")
        assert process.wait(20) == ExitCode.REFUSED
