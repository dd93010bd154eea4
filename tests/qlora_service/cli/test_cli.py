from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

COMMANDS = ("serve", "submit", "watch", "download", "jobs", "cancel", "models", "recipes", "demo")


def test_help_lists_every_command(run: Any) -> None:
    listing = run("--help").stdout
    assert all(command in listing for command in COMMANDS)


@pytest.mark.parametrize("command", [(name,) for name in COMMANDS] + [("models", "import"), ("models", "list")])
def test_every_command_explains_itself(run: Any, command: tuple[str, ...]) -> None:
    outcome = run(*command, "--help")
    assert outcome.code == 0
    assert "Usage: qlora" in outcome.stdout


def test_unusable_setting_is_one_message(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_PORT", "eighty")
    outcome = run("jobs")
    assert outcome.code == 2
    assert outcome.stderr.startswith("error: these settings cannot be used: QLORA_PORT: ")
    assert outcome.stderr.count("\n") == 1


def test_unusable_address_is_one_message(run: Any) -> None:
    outcome = run("jobs", "--url", "localhost:8080")
    assert outcome.code == 1
    assert "'localhost:8080' is no address of a service" in outcome.stderr


def test_command_line_needs_the_base_dependencies_only() -> None:
    heavy = ("torch", "transformers", "fastapi", "sqlalchemy", "obstore", "pyarrow", "tokenizers", "numpy")
    code = f"import sys, qlora_service.cli; print([name for name in {heavy} if name in sys.modules])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout == "[]\n"
