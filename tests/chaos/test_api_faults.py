"""The API when it is killed, its database is locked, or its disk is full: real processes, locks and disks."""

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

SHORT_LOCK_TIMEOUT = "from qlora_service.store import database; database.BUSY_TIMEOUT_MS = 400"

# Kills the API once, after the first request's commit and before its answer.
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


def test_sdk_creates_one_job_when_the_first_answer_is_lost(data_dir: Path) -> None:
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


def test_stream_has_every_event_once_across_kills_of_the_api(data_dir: Path) -> None:
    queue, events = open_queue(data_dir), list[Event]()
    with RunningApi(data_dir) as api, Client(api.url, patience_s=120) as client:
        job_id = client.submit(SPEC).id
        claimed = queue.claim("test")
        assert claimed is not None
        claim = claimed[0]
        reader = threading.Thread(target=lambda: events.extend(client.watch(job_id)))
        reader.start()
        ended = threading.Event()

        def train() -> None:
            for step in range(1, 10_000):
                queue.report(claim, Progress(step=step), ("metrics", {"attempt": claim.token, "step": step}))
                if ended.wait(0.01):
                    break
            queue.fail(claim, {"code": "job_failed", "message": "no"})

        training = threading.Thread(target=train)
        training.start()
        for _ in range(3):
            time.sleep(0.6)
            api.stop(signal.SIGKILL)
            api.start()
        ended.set()
        training.join()
        reader.join(120)
        stored = stored_events(api.url, job_id)
    assert [event.seq for event in events] == stored
    steps = [event.data["step"] for event in events if event.type == "metrics"]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 50


def stored_events(url: str, job_id: str) -> list[int]:
    """The sequence numbers of all events, read without interruption."""
    with Client(url) as client:
        return [event.seq for event in client.events(job_id)]


def test_locked_database_gives_503_and_no_job(data_dir: Path) -> None:
    with RunningApi(data_dir, SHORT_LOCK_TIMEOUT) as api:
        with lock(data_dir):
            refused = httpx2.post(f"{api.url}/jobs", json=SPEC, headers=KEY, timeout=20)
            assert refused.status_code == 503
            assert int(refused.headers["Retry-After"]) > 0
            assert "locked" in refused.json()["error"]["message"]
            # Readers do not wait for the writer.
            assert jobs(api) == []
            assert httpx2.get(f"{api.url}/readyz").status_code == 200
        accepted = httpx2.post(f"{api.url}/jobs", json=SPEC, headers=KEY, timeout=20)
        assert (accepted.status_code, "Idempotent-Replayed" in accepted.headers) == (201, False)
        assert jobs(api) == [accepted.json()["id"]]


def test_concurrent_requests_to_a_locked_database_all_get_503(data_dir: Path) -> None:
    statuses: list[int] = []

    def post(url: str) -> None:
        statuses.append(httpx2.post(f"{url}/jobs", json=SPEC, timeout=60).status_code)

    with RunningApi(data_dir, SHORT_LOCK_TIMEOUT) as api:
        with lock(data_dir):
            threads = [threading.Thread(target=post, args=(api.url,)) for _ in range(20)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert statuses == [503] * 20
        assert jobs(api) == []


def test_sdk_retries_until_the_database_is_unlocked(data_dir: Path) -> None:
    with RunningApi(data_dir, SHORT_LOCK_TIMEOUT) as api, Client(api.url) as client:
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


def test_request_waits_for_a_short_database_lock(data_dir: Path) -> None:
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
    """An API whose data directory is a file system of 3 MiB."""
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
def test_full_disk_refuses_an_upload_and_leaves_no_file(
    on_small_disk: RunningApi, send: Callable[[str, bytes], httpx2.Response], size: int
) -> None:
    line = json.dumps({"prompt": "x" * 1000, "completion": "y"}).encode() + b"\n"
    refused = send(on_small_disk.url, line * (size // len(line)))
    assert refused.status_code == 503
    assert refused.headers["Retry-After"]
    assert "no space left" in refused.json()["error"]["message"]
    data_dir = Path(f"/proc/{on_small_disk.pid()}/root{on_small_disk.data_dir}")  # in the mount namespace of the API
    left = [path for name in ("artifacts", "tmp") for path in (data_dir / name).rglob("*") if path.is_file()]
    assert left == []
    assert httpx2.get(f"{on_small_disk.url}/datasets").json()["data"] == []
    # The disk has room again, and the idempotency key is unused.
    stored = send(on_small_disk.url, line * 20)
    assert (stored.status_code, stored.json()["rows"]) == (201, 20)
