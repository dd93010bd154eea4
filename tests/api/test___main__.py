from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from qlora_service.queue.queue import Queue
from qlora_service.settings import Settings
from tests.api.conftest import ROOT, Server, api_environment, chat_rows, scratch_files, spec_of
from tests.running_api import RunningApi
from tests.workspace import IGNORING_SIGINT


def run_api(settings: Settings, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "api"],
        cwd=ROOT,
        env=api_environment(settings) | environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_port_in_use_is_reported_in_one_line(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run_api(settings, QLORA_PORT=str(port))
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"cannot listen on 127.0.0.1:{port}: Address already in use. Stop the process that uses the port, or set "
        "QLORA_PORT (QLORA_HOST)"
    ]


def test_invalid_setting_is_reported_in_one_line(settings: Settings) -> None:
    result = run_api(settings, QLORA_PORT="eighty")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "QLORA_PORT: Input should be a valid integer" in line


def test_listening_on_the_network_without_keys_is_refused(settings: Settings) -> None:
    result = run_api(settings, QLORA_HOST="0.0.0.0", QLORA_KEYS="off")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "QLORA_KEYS=off with QLORA_HOST=0.0.0.0 would give the whole network access: leave QLORA_KEYS out" in line
    assert not (settings.data_dir / "state.db").exists()


def test_data_directory_that_cannot_be_created_is_reported_in_one_line(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run_api(settings, QLORA_DATA_DIR=str(tmp_path / "file"))
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line == f"cannot write in {tmp_path / 'file'}: Not a directory. Set QLORA_DATA_DIR"


def test_server_responds_logs_and_stops_cleanly(start_server: Callable[..., Server], settings: Settings) -> None:
    server = start_server()
    assert httpx2.get(f"{server.url}/readyz").json() == {"status": "ok"}
    too_large = httpx2.post(f"{server.url}/datasets", content=b"x" * (settings.max_upload_bytes + 1))
    assert too_large.status_code == 413
    assert server.stop() < 2
    assert server.process.returncode == -15
    # Successful reads are logged at level debug.
    (request,) = [line for line in server.lines() if line["event"] == "request"]
    assert (request["path"], request["status"], request["level"]) == ("/datasets", 413, "info")
    assert str(request["request_id"]).startswith("req_")
    assert "Traceback" not in server.log.read_text()
    assert list(settings.tmp_dir.iterdir()) == []


def test_upload_interrupted_by_a_kill_is_deleted_at_the_next_start(
    start_server: Callable[..., Server], settings: Settings
) -> None:
    server = start_server()
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(
            b"POST /datasets HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000\r\n\r\n" + b"x" * 2_000_000
        )
        deadline = time.monotonic() + 10
        while not any(path.stat().st_size for path in scratch_files(settings)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.process.kill()
        server.process.wait()
    assert scratch_files(settings) != []
    start_server()
    wait_until(lambda: scratch_files(settings) == [])


@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGINT])
def test_process_exits_in_time_while_a_request_hangs(
    start_server: Callable[..., Server], settings: Settings, queue: Queue, stop_signal: signal.Signals
) -> None:
    server = start_server()
    dataset_id = httpx2.post(f"{server.url}/datasets", content=chat_rows(4)).json()["id"]
    job_id = httpx2.post(f"{server.url}/jobs", json=spec_of(dataset_id)).json()["id"]
    lock = sqlite3.connect(settings.resolved_data_dir / "state.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")

    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        head = f"POST /jobs/{job_id}/cancel HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
        connection.sendall(head.encode())
        # The response to this request shows that the server has received the one before it.
        assert httpx2.get(f"{server.url}/healthz", timeout=60).status_code == 200
        assert server.stop(stop_signal) < 5
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 503")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "unavailable"
    lock.execute("ROLLBACK")
    lock.close()
    # The aborted request had no effect.
    claimed = queue.claim("worker")
    assert claimed is not None
    assert claimed[1].id == job_id


def test_server_that_ignores_ctrl_c_stops_at_sigterm(tmp_path: Path) -> None:
    with RunningApi(tmp_path, within=IGNORING_SIGINT) as server:
        os.kill(server.pid(), signal.SIGINT)
        time.sleep(0.5)
        assert server.answers()
        server.stop(signal.SIGTERM)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
