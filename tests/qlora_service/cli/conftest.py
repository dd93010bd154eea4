"""A running API with one base model, and commands run against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qlora_service.cli import main
from qlora_service.client import Client
from qlora_service.models.catalog import Catalog
from qlora_service.queue import Queue
from tests.running_api import RunningApi, open_queue, write_rows


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str


Run = Callable[..., Outcome]


@pytest.fixture(scope="session")
def api(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApi]:
    data_dir = tmp_path_factory.mktemp("data")
    Catalog(data_dir / "models").import_model("tiny", tiny_model)
    with RunningApi(data_dir) as running:
        yield running


@pytest.fixture
def client(api: RunningApi) -> Iterator[Client]:
    with Client(api.url) as client:
        yield client


@pytest.fixture
def queue(api: RunningApi) -> Queue:
    return open_queue(api.data_dir)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, api: RunningApi) -> Run:
    """Runs a command in this process, with the API's address in the environment."""
    monkeypatch.setenv("QLORA_URL", api.url)

    def call(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Outcome(caught.value.code, printed.out, printed.err)

    return call
