"""A real API process over a data directory, and helpers to act as the worker of that directory."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from qlora_service.artifacts.manifest import Manifest, ManifestFile
from qlora_service.artifacts.store import ArtifactStore, job_key
from qlora_service.cli.serving import pick_port
from qlora_service.client import Client
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.queue.claim import Claim
from qlora_service.queue.queue import Queue
from qlora_service.store.database import Database

ROOT = Path(__file__).parents[1]
ROWS = [{"prompt": f"{n} plus one is", "completion": f" {n + 1}."} for n in range(8)]


class RunningApi:
    """An API process; a restart keeps its address. `log` is the file with its output."""

    def __init__(self, data_dir: Path, prelude: str = "", within: Sequence[str] = ()) -> None:
        """`prelude` is Python code to run before the service, for fault injection; `within` a command prefix."""
        self.data_dir = data_dir
        code = f"{prelude}\nfrom api.__main__ import main\nraise SystemExit(main())"
        self._command = [*within, sys.executable, "-c", code]
        self.port = pick_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = data_dir / "api.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the process and returns once it answers."""
        process = self.launch()
        with Client(self.url) as client:
            deadline = time.monotonic() + 30
            while not client.healthy():
                assert process.poll() is None, self.log.read_text()
                assert time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.05)

    def launch(self) -> subprocess.Popen[bytes]:
        """Starts the process, which does not answer yet."""
        environment = {
            **os.environ,
            "QLORA_DATA_DIR": str(self.data_dir),
            "QLORA_PORT": str(self.port),
            "QLORA_KEYS": "off",
            "QLORA_LOG_LEVEL": "DEBUG",
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        return self._process

    def answers(self) -> bool:
        with Client(self.url) as client:
            return client.healthy()

    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def ended(self) -> bool:
        """Whether the process has ended without `stop`."""
        return self._process is not None and self._process.poll() is not None

    def stop(self, signal_: signal.Signals = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(signal_)
            self._process.wait(30)
            self._process = None


def open_queue(data_dir: Path) -> Queue:
    return Queue(Database(f"sqlite:///{data_dir / 'state.db'}"), lease_s=60)


def succeed(data_dir: Path, queue: Queue, claim: Claim, files: dict[str, bytes]) -> None:
    """Publishes the files for the claimed job and ends it as succeeded."""
    store = ArtifactStore((data_dir / "artifacts").as_uri())
    for name, content in files.items():
        store.create(job_key(claim.job_id, claim.token, name), content)
    manifest = Manifest(
        job_id=claim.job_id,
        attempt=claim.token,
        base_model={},
        dataset={},
        spec={},
        plan={},
        versions={},
        held_out={},
        files=tuple(
            ManifestFile(name=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
            for name, content in files.items()
        ),
    )
    store.create(job_key(claim.job_id, claim.token, "manifest.json"), manifest.model_dump_json().encode())
    queue.succeed(claim, {"attempt": claim.token, "steps": 1, "best_step": None})


def write_rows(path: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def api(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApi]:
    """An API with one base model, `tiny`."""
    data_dir = tmp_path_factory.mktemp("data")
    Catalog(data_dir / "models").import_model("tiny", tiny_model)
    with RunningApi(data_dir) as running:
        yield running


@pytest.fixture
def queue(api: RunningApi) -> Queue:
    return open_queue(api.data_dir)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")
