"""`qlora serve` as a real process, with a real job on the tiny model."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from qlora_service.client import Client
from qlora_service.models.catalog import Catalog
from tests.running_api import write_rows

SPEC = {
    "base_model": "tiny",
    "training": {"max_steps": 2, "batch_size": 4, "max_seq_len_tokens": 64},
}
Serve = Callable[..., tuple["subprocess.Popen[str]", str]]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts `qlora serve` and returns it with its address, once it says that it listens."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "qlora_service.cli", "serve", "--data-dir", str(tmp_path / "data"), *arguments]
        log = tmp_path / "serve.log"
        with log.open("ab") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        started.append(process)
        assert process.stdout is not None
        address = re.search(r"listens at (http://\S+);", _line(process.stdout))
        assert address is not None, log.read_text()
        return process, address[1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def _line(stream: IO[str]) -> str:
    return next((line for line in stream if "listens at" in line), "")


def descendants(pid: int) -> set[int]:
    """Every process below `pid`."""
    children = {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    return children.union(*(descendants(child) for child in children))


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}").exists()}


def workers_pid(pids: set[int]) -> int:
    return next(pid for pid in pids if b"workers" in Path(f"/proc/{pid}/cmdline").read_bytes())


def test_served_job_trains_and_its_adapter_is_downloaded(serve: Serve, tiny_model: Path, tmp_path: Path) -> None:
    Catalog(tmp_path / "data" / "models").import_model("tiny", tiny_model)
    process, url = serve("--port", "0")
    with Client(url) as client:
        job = client.submit(SPEC, write_rows(tmp_path / "rows.jsonl"))
        ended = client.wait(job.id, timeout_s=120)
        assert ended.status == "succeeded", ended.error
        names = {path.name for path in client.download(job.id, tmp_path / "adapter")}
        assert {"adapter_model.safetensors", "adapter_config.json", "manifest.json"} <= names
        losses = [record["eval_loss"] for record in client.metrics(job.id) if "eval_loss" in record]
        assert len(losses) >= 2
    children = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert not alive(children)


def test_end_of_the_worker_stops_the_api(serve: Serve) -> None:
    process, url = serve("--port", "0")
    children = descendants(process.pid)
    assert len(children) == 2
    wait_until(lambda: b"workers" in b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children))
    os.kill(workers_pid(children), signal.SIGKILL)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "python -m workers ended with signal SIGKILL" in output
    assert not alive(children)
    with Client(url) as client:
        assert not client.healthy()


def test_killed_service_leaves_no_process_behind(serve: Serve) -> None:
    process, _ = serve("--port", "0")
    children = descendants(process.pid)
    assert len(children) == 2
    process.kill()
    process.wait()
    wait_until(lambda: not alive(children))


def test_taken_port_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "qlora_service.cli", "serve", "--port", port, "--data-dir", str(tmp_path)]
        child = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert child.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in child.stderr
    assert "--port" in child.stderr
    assert list(tmp_path.iterdir()) == []
