"""The API killed, its database locked and its disk full: real processes, real locks, a real disk without room."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from qlora_service.client import Client, Event
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.queue.claim import Progress
from tests.running_api import ROWS, RunningApi, open_queue

SPEC = {"base_model": "tiny", "dataset": {"rows": ROWS}, "training": {"max_seq_len_tokens": 64}}
KEY = {"Idempotency-Key": "one"}

IMPATIENT = "from qlora_service.store import database; database.BUSY_TIMEOUT_MS = 400"

# Dies once, when the work of the first request is on disk and before its answer leaves.
DIES_ONCE = """
import os, pathlib, signal, threading
from contextlib import contextmanager
from qlora_service.store.database import Database

committed = Database.write

@contextmanager
def write(self):
    with committed(self) as connection:
        yield connection
    mark = pathlib.Path(os.environ["QLORA_DATA_DIR"], "died")
    if threading.current_thread() is not threading.main_thread() and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

Database.write = write
"""

SMALL_DISK = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=3m none "$QLORA_DATA_DIR" && exec "$@"', "sh")


@pytest.fixture
def data_dir(tiny_model: Path, tmp_path: Path) -> Path:
    Catalog(tmp_path / "models").import_model("tiny", tiny_model)
    return tmp_path


@contextmanager
def lock(data_dir: Path) -> Iterator[None]:
    connection = sqlite3.connect(data_dir / "state.db", isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    yield
    connection.close()


def jobs(api: RunningApi) -> list[str]:
    return [job["id"] for job in httpx2.get(f"{api.url}/jobs").json()["data"]]


def test_sdk_makes_one_job_when_the_answer_to_its_first_try_is_lost(data_dir: Path) -> None:
    with RunningApi(data_dir, DIES_ONCE) as api, Client(api.url) as client:
        submitted: list[str] = []
        submitting = threading.Thread(target=lambda: submitted.append(client.submit(SPEC).id))
        submitting.start()
        deadline = time.monotonic() + 20
        while not api.ended():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        api.start()
        submitting.join(20)
        assert jobs(api) == submitted


def test_stream_shows_every_event_once_however_often_the_api_is_killed(data_dir: Path) -> None:
    queue, events = open_queue(data_dir), list[Event]()
    with RunningApi(data_dir) as api, Client(api.url, patience_s=120) as client:
        job_id = client.submit(SPEC).id
        claimed = queue.claim("test")
        assert claimed is not None
        claim = claimed[0]
        reader = threading.Thread(target=lambda: events.extend(client.watch(job_id)))
        reader.start()
        over = threading.Event()

        def train() -> None:
            for step in range(1, 10_000):
                queue.report(claim, Progress(step=step), ("metrics", {"attempt": claim.token, "step": step}))
                if over.wait(0.01):
                    break
            queue.fail(claim, {"code": "job_failed", "message": "no"})

        training = threading.Thread(target=train)
        training.start()
        for _ in range(3):
            time.sleep(0.6)
            api.stop(signal.SIGKILL)
            api.start()
        over.set()
        training.join()
        reader.join(120)
        stored = client_events(api.url, job_id)
    assert [event.seq for event in events] == stored
    steps = [event.data["step"] for event in events if event.type == "metrics"]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 50


def client_events(url: str, job_id: str) -> list[int]:
    """The numbers of all events, read in one go."""
    with Client(url) as client:
        return [event.seq for event in client.events(job_id)]


def test_database_locked_for_long_is_a_503_and_no_job(data_dir: Path) -> None:
    with RunningApi(data_dir, IMPATIENT) as api:
        with lock(data_dir):
            refused = httpx2.post(f"{api.url}/jobs", json=SPEC, headers=KEY, timeout=20)
            assert refused.status_code == 503
            assert int(refused.headers["Retry-After"]) > 0
            assert "locked" in refused.json()["error"]["message"]
            # Who only reads does not wait for who writes.
            assert jobs(api) == []
            assert httpx2.get(f"{api.url}/readyz").status_code == 200
        again = httpx2.post(f"{api.url}/jobs", json=SPEC, headers=KEY, timeout=20)
        assert (again.status_code, "Idempotent-Replayed" in again.headers) == (201, False)
        assert jobs(api) == [again.json()["id"]]


def test_many_requests_at_a_locked_database_are_all_told_to_try_again(data_dir: Path) -> None:
    statuses: list[int] = []

    def post(url: str) -> None:
        statuses.append(httpx2.post(f"{url}/jobs", json=SPEC, timeout=60).status_code)

    with RunningApi(data_dir, IMPATIENT) as api:
        with lock(data_dir):
            threads = [threading.Thread(target=post, args=(api.url,)) for _ in range(20)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert statuses == [503] * 20
        assert jobs(api) == []


def test_sdk_outlasts_a_locked_database(data_dir: Path) -> None:
    with RunningApi(data_dir, IMPATIENT) as api, Client(api.url) as client:
        submitted: list[str] = []
        submitting = threading.Thread(target=lambda: submitted.append(client.submit(SPEC).id))
        with lock(data_dir):
            submitting.start()
            deadline = time.monotonic() + 40
            while '"status": 503' not in api.log.read_text():
                assert time.monotonic() < deadline
                time.sleep(0.05)
        submitting.join(60)
        assert jobs(api) == submitted
        assert len(submitted) == 1


def test_database_locked_for_a_moment_is_waited_for(data_dir: Path) -> None:
    with RunningApi(data_dir) as api:
        answers: list[int] = []
        posting = threading.Thread(
            target=lambda: answers.append(httpx2.post(f"{api.url}/jobs", json=SPEC, timeout=20).status_code)
        )
        with lock(data_dir):
            posting.start()
            time.sleep(1.0)
            assert answers == []
        posting.join(20)
        assert answers == [201]


@pytest.fixture
def on_small_disk(tmp_path: Path) -> Iterator[RunningApi]:
    """An API whose data directory is a disk of 3 MiB of its own."""
    environment = {"QLORA_DATA_DIR": str(tmp_path), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}
    allowed = subprocess.run([*SMALL_DISK, "true"], env=environment, capture_output=True, check=False)
    if allowed.returncode != 0:
        pytest.skip(f"no disk can be mounted here: {allowed.stderr.decode().strip()}")
    with RunningApi(tmp_path, within=SMALL_DISK) as api:
        yield api


@pytest.mark.parametrize("size", [6 * 2**20, 3 * 2**19], ids=["as it arrives", "as it is stored"])
@pytest.mark.parametrize("send", [
    lambda url, rows: httpx2.post(f"{url}/datasets", content=rows, headers=KEY),
    lambda url, rows: httpx2.post(f"{url}/datasets", files={"file": ("a.jsonl", rows)}, headers=KEY),
], ids=["raw", "form"])  # fmt: skip
def test_full_disk_refuses_an_upload_and_keeps_nothing_of_it(
    on_small_disk: RunningApi, send: Callable[[str, bytes], httpx2.Response], size: int
) -> None:
    line = json.dumps({"prompt": "x" * 1000, "completion": "y"}).encode() + b"\n"
    refused = send(on_small_disk.url, line * (size // len(line)))
    assert refused.status_code == 503
    assert refused.headers["Retry-After"]
    assert "no space left" in refused.json()["error"]["message"]
    seen = Path(f"/proc/{on_small_disk.pid()}/root{on_small_disk.data_dir}")
    left = [path for name in ("artifacts", "tmp") for path in (seen / name).rglob("*") if path.is_file()]
    assert left == []
    assert httpx2.get(f"{on_small_disk.url}/datasets").json()["data"] == []
    # There is room again, and the key is free.
    stored = send(on_small_disk.url, line * 20)
    assert (stored.status_code, stored.json()["rows"]) == (201, 20)
