"""`qlora serve` as a real process, with a real job on the tiny model."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from qlora_service.client import Client
from qlora_service.models.catalog.catalog import Catalog
from tests.running_api import write_rows
from tests.workspace import IGNORING_SIGINT, ignored_signals

SPEC = {
    "base_model": "tiny",
    "training": {"max_steps": 2, "batch_size": 4, "max_seq_len_tokens": 64},
}


@dataclass(frozen=True)
class Served:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def children(self) -> dict[str, int]:
        """The process ids of the API and the worker."""
        pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return {Path(f"/proc/{pid}/cmdline").read_text().split("\0")[-2]: int(pid) for pid in pids}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path) as served:
        yield served


@contextmanager
def serving(tmp_path: Path, within: Sequence[str] = ()) -> Iterator[Served]:
    """`qlora serve` with a ready worker. `within`: a command prefix."""
    log = tmp_path / "serve.log"
    arguments = ["-m", "qlora_service.cli", "serve", "--port", "0", "--data-dir", str(tmp_path / "data")]
    command = [*within, sys.executable, *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    wait_until(lambda: b"supervisor_ready" in log.read_bytes() or process.poll() is not None)
    address = re.search(r"listens at (http://\S+);", log.read_text())
    assert address is not None, log.read_text()
    served = Served(process, address[1], log)
    children = served.children()
    try:
        yield served
    finally:
        process.kill()
        process.wait()
        for pid in alive(children.values()):
            os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pids: Iterable[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}").exists()}


def test_served_job_succeeds_and_the_service_stops_with_its_children(
    serve: Served, tiny_model: Path, tmp_path: Path
) -> None:
    Catalog(tmp_path / "data" / "models").import_model("tiny", tiny_model)
    with Client(serve.url) as client:
        job = client.submit(SPEC, write_rows(tmp_path / "rows.jsonl"))
        ended = client.wait(job.id, timeout_s=120)
        assert ended.status == "succeeded", ended.error
        names = {path.name for path in client.download(job.id, tmp_path / "adapter")}
        assert {"adapter_model.safetensors", "adapter_config.json", "manifest.json"} <= names
        losses = [record["eval_loss"] for record in client.metrics(job.id) if "eval_loss" in record]
        assert len(losses) >= 2
    children = serve.children()
    assert set(children) == {"api", "workers"}
    serve.process.send_signal(signal.SIGTERM)
    assert serve.process.wait(30) == 0
    assert not alive(children.values())


@pytest.mark.parametrize(("killed", "other"), [("workers", "api"), ("api", "workers")])
def test_end_of_one_program_stops_the_other(serve: Served, killed: str, other: str) -> None:
    children = serve.children()
    os.kill(children[killed], signal.SIGKILL)
    assert serve.process.wait(30) == 1
    assert f"python -m {killed} ended with signal SIGKILL" in serve.log.read_text()
    assert not alive([children[other]])


def test_killed_service_leaves_no_process_behind(serve: Served) -> None:
    children = serve.children()
    assert alive(children.values())
    serve.process.kill()
    serve.process.wait()
    wait_until(lambda: not alive(children.values()))


def test_service_that_ignores_ctrl_c_stops_at_sigterm_with_its_children(tmp_path: Path) -> None:
    with serving(tmp_path, within=IGNORING_SIGINT) as serve:
        children = serve.children()
        assert not any(ignored_signals(pid) & {signal.SIGINT, signal.SIGTERM} for pid in children.values())
        serve.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert serve.process.poll() is None
        serve.process.send_signal(signal.SIGTERM)
        assert serve.process.wait(30) == 0
        assert not alive(children.values())


def test_used_port_is_reported_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        command = [sys.executable, "-m", "qlora_service.cli", "serve", "--port", port, "--data-dir", str(tmp_path)]
        child = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert child.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in child.stderr
    assert "--port" in child.stderr
    assert list(tmp_path.iterdir()) == []
