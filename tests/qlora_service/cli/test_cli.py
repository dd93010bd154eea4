from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer

from qlora_service.cli import app
from qlora_service.cli.exit_codes import MEANINGS, ExitCode
from qlora_service.client import Client

PAGE = Path(__file__).parents[3] / "docs" / "api.md"
WITHOUT_JSON = {("serve",), ("demo",)}
"""Commands that print lines while they run, and have no result."""


def commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    """The words and the definition of every command."""

    def commands_under(words: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
        children = getattr(command, "commands", None)
        if children is None:
            yield words, command
        for name, child in (children or {}).items():
            yield from commands_under((*words, name), child)

    return commands_under((), typer.main.get_command(app))


COMMANDS = dict(commands())


def test_help_lists_every_command(run: Any) -> None:
    listing = run("--help").stdout
    assert {words[0] for words in COMMANDS} >= {"serve", "submit", "watch", "logs", "datasets", "models", "demo"}
    assert all(words[0] in listing for words in COMMANDS)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help(run: Any, words: tuple[str, ...]) -> None:
    outcome = run(*words, "--help")
    assert outcome.code == 0
    assert f"Usage: qlora {' '.join(words)}" in outcome.stdout


@pytest.mark.parametrize("words", sorted(COMMANDS.keys() - WITHOUT_JSON), ids=" ".join)
def test_every_command_with_a_result_has_json_output(words: tuple[str, ...]) -> None:
    assert "--json" in {option for parameter in COMMANDS[words].params for option in parameter.opts}


def test_exit_codes_are_those_of_help_and_documentation(run: Any) -> None:
    assert {code.name: code.value for code in ExitCode} == {
        "DONE": 0,
        "REFUSED": 1,
        "USAGE": 2,
        "UNREACHABLE": 3,
        "JOB_FAILED": 4,
        "JOB_CANCELLED": 5,
        "DOES_NOT_FIT": 6,
        "INTERRUPTED": 130,
    }
    help_text = " ".join(run("--help").stdout.split())
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    for code, meaning in MEANINGS.items():
        assert f"{code.value} {meaning}" in help_text
        assert f"| {code.value} | {meaning} |" in page


@pytest.mark.parametrize(
    ("arguments", "code"), [(("jobs", "--limit", 0), 2), (("jobs", "--url", "http://127.0.0.1:9"), 3)]
)
def test_wrong_usage_and_an_absent_service_have_different_exit_codes(
    run: Any, arguments: tuple[object, ...], code: int
) -> None:
    assert run(*arguments).code == code


def completion_environment(words: str) -> dict[str, str]:
    """The environment in which bash requests completions for the last of `words`."""
    return {"_QLORA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}


def test_bash_completes_commands_options_and_job_ids(
    run: Any, api: Any, client: Client, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = client.submit({"base_model": "tiny", "training": {"max_seq_len_tokens": 64}}, rows)

    def completions(words: str) -> list[str]:
        for name, value in completion_environment(words).items():
            monkeypatch.setenv(name, value)
        outcome = run()
        assert (outcome.code, outcome.stderr) == (0, "")
        candidates: list[str] = outcome.stdout.split()
        return candidates

    assert completions("qlora datasets ch") == ["check"]
    assert completions("qlora jobs --status r") == ["running"]
    assert completions("qlora datasets check --shape sh") == ["sharegpt"]
    assert job.id in completions(f"qlora watch {job.id[:8]}")
    monkeypatch.setenv("QLORA_URL", "http://127.0.0.1:9")
    assert completions("qlora watch job_") == []


def test_completion_answers_a_real_shell_call() -> None:
    command = [sys.executable, "-m", "qlora_service.cli"]
    environment = {**os.environ, **completion_environment("qlora pau")}
    child = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert (child.stdout.split(), child.stderr) == (["pause"], "")


def test_completion_script_names_the_command(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    script = run("--show-completion", "bash").stdout
    assert re.search(r"complete .*-F _qlora_completion qlora\b", script)


def test_key_of_the_environment_is_sent_and_not_printed(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str | None] = []

    class Recorder(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            sent.append(self.headers["Authorization"])
            self.send_response(200)
            self.send_header("Content-Length", "26")
            self.end_headers()
            self.wfile.write(b'{"data": [], "next": null}')

        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Recorder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        for key in ("sk-secret", ""):
            monkeypatch.setenv("QLORA_API_KEY", key)
            assert run("jobs", "--url", f"http://127.0.0.1:{server.server_port}").code == 0
        monkeypatch.setenv("QLORA_API_KEY", "sk secret")
        refused = run("jobs")
        server.shutdown()
        thread.join()
    assert sent == ["Bearer sk-secret", None]
    assert refused.code == 2
    assert "the API key" in refused.stderr
    assert "secret" not in refused.stderr


def test_unusable_setting_is_one_message(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_PORT", "eighty")
    outcome = run("jobs")
    assert outcome.code == 2
    assert outcome.stderr.startswith("error: these settings cannot be used: QLORA_PORT: ")
    assert outcome.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [("--url", "localhost:8080"), ()])
def test_unusable_address_is_one_message(
    run: Any, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...]
) -> None:
    monkeypatch.setenv("QLORA_URL", "localhost:8080")
    outcome = run("jobs", *arguments)
    assert outcome.code == 2
    assert "'localhost:8080' is not the address of a service" in outcome.stderr


def test_command_line_needs_the_base_dependencies_only() -> None:
    heavy = ("torch", "transformers", "fastapi", "sqlalchemy", "obstore", "pyarrow", "tokenizers", "numpy")
    code = f"import sys, qlora_service.cli; print([name for name in {heavy} if name in sys.modules])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout == "[]\n"
