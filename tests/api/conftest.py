"""Fixtures with the application over real state: SQLite, artifacts and an imported model in a directory per test."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest
from fastapi.testclient import TestClient
from starlette.types import ASGIApp, Message

from api.main import create_app
from qlora_service.artifacts.manifest import MANIFEST_NAME, Manifest, describe_file
from qlora_service.artifacts.store import ArtifactStore, job_key
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.queue.claim import Claim
from qlora_service.queue.queue import Queue
from qlora_service.settings import Settings
from qlora_service.store.database import Database

ROOT = Path(__file__).resolve().parents[2]
MAX_UPLOAD_BYTES = 4 * 2**20
# The default host name of TestClient is not one of the service's.
URL = "http://localhost:8080"
FILES = {
    "adapter_model.safetensors": bytes(range(256)) * 300,
    "adapter_config.json": b'{"r": 16}',
    "README.md": "# Ein Adapter für Übersetzungen\n".encode(),
    "empty.txt": b"",
}


def chat_rows(count: int, answer: str = "Paris") -> bytes:
    rows = (
        {
            "messages": [
                {"role": "user", "content": f"Question {i}: capital of France?"},
                {"role": "assistant", "content": answer},
            ]
        }
        for i in range(count)
    )
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def spec_of(dataset_id: str | None = None, **changes: object) -> dict[str, object]:
    """The JSON of a job on the tiny model."""
    dataset = {} if dataset_id is None else {"id": dataset_id}
    return {"base_model": "tiny", "dataset": dataset, "training": {"max_seq_len_tokens": 128}} | changes


@pytest.fixture(scope="session")
def models_dir(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog that contains the tiny model under the name `tiny`."""
    path = tmp_path_factory.mktemp("catalog")
    Catalog(path).import_model("tiny", tiny_model)
    return path


def settings_in(parent: Path, models_dir: Path) -> Settings:
    data_dir = parent / "data"
    data_dir.mkdir()
    (data_dir / "models").symlink_to(models_dir)
    return Settings(data_dir=data_dir, port=0, max_upload_bytes=MAX_UPLOAD_BYTES)


@pytest.fixture
def settings(tmp_path: Path, models_dir: Path) -> Settings:
    return settings_in(tmp_path, models_dir)


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), URL) as client:
        yield client


@pytest.fixture
def queue(settings: Settings) -> Iterator[Queue]:
    """The queue as a worker sees it."""
    database = Database(settings.resolved_database_url)
    yield Queue(database, lease_s=30)
    database.close()


@pytest.fixture
def dataset_id(client: TestClient) -> str:
    response = client.post("/datasets?filename=train.jsonl", content=chat_rows(8))
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


@pytest.fixture
def submit(client: TestClient, dataset_id: str) -> Callable[..., str]:
    """A function that submits a job on the stored dataset and returns its id."""

    def submit_job(**changes: object) -> str:
        response = client.post("/jobs", json=spec_of(dataset_id, **changes))
        assert response.status_code == 201, response.text
        return str(response.json()["id"])

    return submit_job


@pytest.fixture
def finished_job(submit: Callable[..., str], queue: Queue, settings: Settings, tmp_path: Path) -> str:
    """The id of a job that succeeded and published FILES and a manifest, as a trainer does."""
    job_id = submit()
    claimed = queue.claim("worker")
    assert claimed is not None
    publish(claimed[0], settings, tmp_path / "outbox")
    queue.succeed(claimed[0], {"attempt": claimed[0].token})
    return job_id


def publish(claim: Claim, settings: Settings, outbox: Path) -> None:
    store = ArtifactStore(settings.resolved_artifact_url)
    outbox.mkdir()
    for name, content in FILES.items():
        (outbox / name).write_bytes(content)
        store.put_file(job_key(claim.job_id, claim.token, name), outbox / name)
    manifest = Manifest(
        job_id=claim.job_id,
        attempt=claim.token,
        base_model={},
        dataset={},
        spec={},
        plan={},
        versions={},
        held_out={},
        files=tuple(describe_file(outbox / name) for name in FILES),
    )
    store.create(job_key(claim.job_id, claim.token, MANIFEST_NAME), manifest.model_dump_json().encode())


@pytest.fixture(scope="module")
def bare_client(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[TestClient]:
    """An application with a model and nothing else, shared by requests that must not change its state."""
    with TestClient(create_app(settings_in(tmp_path_factory.mktemp("bare"), models_dir)), URL) as client:
        yield client


@pytest.fixture
def nothing_stored(bare_client: TestClient) -> Callable[[], None]:
    """A function that asserts that the bare application stores no job, no dataset and no file."""
    settings: Settings = bare_client.app.state.settings  # type: ignore[attr-defined]

    def check() -> None:
        assert bare_client.get("/jobs").json()["data"] == []
        assert bare_client.get("/datasets").json()["data"] == []
        assert [path for path in (settings.resolved_data_dir / "artifacts").rglob("*") if path.is_file()] == []
        assert scratch_files(settings) == []

    return check


def scratch_files(settings: Settings) -> list[Path]:
    return [path for path in settings.tmp_dir.rglob("*") if path.is_file()]


def call(app: ASGIApp, method: str, path: str, received: Sequence[Message]) -> list[Message]:
    """The ASGI messages that the application sends after receiving these; a client sees only part of them."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(b"host", b"localhost")],
        "server": ("test", 80), "client": ("test", 1),
    }  # fmt: skip
    pending, sent = list(received), list[Message]()

    async def receive() -> Message:
        return pending.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    anyio.run(app, scope, receive, send)
    return sent


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Server:
    """`python -m api` as a child process."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def stop(self, stop_signal: signal.Signals = signal.SIGTERM) -> float:
        """The seconds from the signal until the process has exited."""
        started = time.monotonic()
        self.process.send_signal(stop_signal)
        self.process.wait(timeout=30)
        return time.monotonic() - started


def api_environment(settings: Settings, port: int = 0) -> dict[str, str]:
    return os.environ | {
        "QLORA_DATA_DIR": str(settings.data_dir),
        "QLORA_PORT": str(port),
        "QLORA_KEYS": settings.keys,
        "QLORA_MAX_UPLOAD_BYTES": str(settings.max_upload_bytes),
    }


@pytest.fixture
def start_server(settings: Settings, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """A function that starts a server and returns it when it listens."""
    started: list[Server] = []

    def start(port: int = 0) -> Server:
        log = tmp_path / f"api-{len(started)}.log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "api"], cwd=ROOT, env=api_environment(settings, port), stderr=stderr
            )
        server = Server(process, log, "")
        started.append(server)
        deadline = time.monotonic() + 30
        while not server.url:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            listening = [line for line in server.lines() if line["event"] == "api_listening"]
            server.url = f"http://127.0.0.1:{listening[0]['port']}" if listening else ""
            time.sleep(0.02)
        return server

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()
