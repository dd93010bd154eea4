"""`qlora chat` against a running API and the inference server of `tests.chat_process`, which repeats each question."""

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
def inference(api: RunningApi, tmp_path: Path) -> Iterator[EchoProcess]:
    with EchoProcess(f"sqlite:///{api.data_dir / 'state.db'}", tmp_path / "inference") as server:
        yield server


@contextmanager
def conversation(api: RunningApi, model: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`qlora chat` without a question: the process, and the controlling end of its terminal."""
    controller, terminal = pty.openpty()
    process = start_chat(api, model, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    try:
        read_until(controller, "> ")
        yield process, controller
    finally:
        process.kill()
        process.wait()
        os.close(controller)


def start_chat(api: RunningApi, *arguments: str, **pipes: Any) -> subprocess.Popen[bytes]:
    """`qlora chat` in its own process."""
    command = [sys.executable, "-m", "qlora_service.cli", "chat", "--url", api.url, *arguments]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)


def read_until(controller: int, expected: str) -> str:
    """The terminal's output up to `expected`."""
    output, deadline = "", time.monotonic() + 20
    while expected not in output:
        assert time.monotonic() < deadline, output
        output += os.read(controller, 1000).decode()
    return output


def test_stdout_is_the_answer_only(run: Any, inference: EchoProcess) -> None:
    outcome = run("chat", "tiny", "Say it again.", "--system", "Be brief.", "--max-tokens", 5, "--temperature", 0)
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, "Say it again.\n", "")
    assert inference.received[-1].messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say it again."},
    ]
    assert (inference.received[-1].sampling.max_tokens, inference.received[-1].sampling.temperature) == (5, 0.0)


def test_a_question_can_be_piped_in(run: Any, inference: EchoProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert run("chat", "tiny").stdout == "from a pipe\n"


def test_json_holds_the_whole_answer(run: Any, inference: EchoProcess) -> None:
    answer = json.loads(run("chat", "tiny", "one two", "--json").stdout)
    assert answer == {"model": "tiny", "content": "one two", "complete": True}


@pytest.mark.parametrize(
    ("model", "message", "code", "reason"),
    [
        ("unknown", "hello", ExitCode.REFUSED, "there is no model 'unknown'"),
        ("tiny", TOO_LONG, ExitCode.REFUSED, "room for 8 tokens"),
        ("tiny", BROKEN_OFF, ExitCode.UNREACHABLE, "has ended"),
    ],
)
def test_a_refusal_is_one_message(
    run: Any, inference: EchoProcess, model: str, message: str, code: ExitCode, reason: str
) -> None:
    outcome = run("chat", model, message)
    assert outcome.code == code
    assert outcome.stderr.startswith("error: ")
    assert reason in outcome.stderr


def test_ctrl_c_stops_the_generation(api: RunningApi, inference: EchoProcess) -> None:
    process = start_chat(api, "tiny", ENDLESS, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.read(len(ENDLESS)) == ENDLESS.encode()
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(20) == ExitCode.INTERRUPTED
    assert inference.client_gone.wait(10)


def test_conversation_keeps_its_history_and_continues_after_a_refusal(api: RunningApi, inference: EchoProcess) -> None:
    with conversation(api, "tiny") as (process, controller):
        for question, answer in (("one", "one\r\n> "), (TOO_LONG, "room for 8 tokens"), ("two", "two\r\n> ")):
            os.write(controller, f"{question}\n".encode())
            read_until(controller, f"{question}\r\n")  # the echo of the terminal itself
            read_until(controller, answer)
        os.write(controller, b"\x04")
        assert process.wait(20) == 0
    assert [message["content"] for message in inference.received[-1].messages or []] == ["one", "one", "two"]


def test_conversation_with_an_unknown_model_ends(api: RunningApi) -> None:
    with conversation(api, "unknown") as (process, controller):
        os.write(controller, b"hello\n")
        read_until(controller, "there is no model 'unknown'")
        assert process.wait(20) == ExitCode.REFUSED
