"""Fixtures: a running API with one base model, a client of it, and commands run against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from qlora_service.cli import main
from qlora_service.client import Client
from tests.running_api import RunningApi, api, queue, rows

__all__ = ["api", "queue", "rows"]


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str


Run = Callable[..., Outcome]


@pytest.fixture
def client(api: RunningApi) -> Iterator[Client]:
    with Client(api.url) as client:
        yield client


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, api: RunningApi) -> Run:
    """Runs a command in this process, with the API's address in the environment."""
    monkeypatch.setenv("QLORA_URL", api.url)

    def run_command(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        assert isinstance(exited.value.code, int)
        return Outcome(exited.value.code, output.out, output.err)

    return run_command
