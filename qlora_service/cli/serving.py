"""The API and the worker as one command: started together, stopped together."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from qlora_service.client import Client
from qlora_service.errors import Conflict, Unavailable
from qlora_service.process.child import kill_group, start_python
from qlora_service.process.signals import stop_signals

STOP_S = 20.0
"""Seconds in which the API and the worker must end. The worker kills a trainer that has not stopped after 8 s, and may
then wait 10 s for a locked database to release the job; the API ends within 4 s."""
POLL_S = 0.1


def serve(*, host: str, port: int, data_dir: Path, report: Callable[[str], None]) -> int:
    """Runs both until a signal; the exit code is 0 after SIGINT or SIGTERM, 1 if the API or the worker ended by itself.

    A second signal kills both at once. `report` receives each line for the user.

    Raises:
        Unavailable: the programs or the packages that they import are not installed.
        Conflict: another process listens on the port.
    """
    root = _programs()
    port = _free_port(host, port)
    url = f"http://{_url_host(host)}:{port}"
    variables = {"QLORA_HOST": host, "QLORA_PORT": str(port), "QLORA_DATA_DIR": str(data_dir)}
    environment = child_environment() | variables
    processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(name: str) -> None:
        processes[name] = start_python(["-m", name], environment=environment, directory=root)

    with _stop_signals() as received, Client(url) as client:
        try:
            start("api")
            while not received and not _ended(processes) and not client.healthy():
                time.sleep(POLL_S)
            if not received and not _ended(processes):
                # After the API, which migrates the database's schema at its start.
                start("workers")
                report(f"qlora-service listens at {url}; documentation at {url}/docs; data in {data_dir}")
            while not received and not _ended(processes):
                time.sleep(POLL_S)
            failures = [] if received else _ended(processes)
            if received:
                report("Stopping. A running job saves its steps, and resumes from them at the next start.")
        finally:
            _stop_all(processes, received)
    for name, code in failures:
        report(f"python -m {name} ended with {_describe_exit(code)}; its messages are above. Everything is stopped.")
    return 1 if failures else 0


def pick_port(host: str) -> int:
    """A port that is free now."""
    return _free_port(host, 0)


def child_environment() -> dict[str, str]:
    """This process's environment, with one core left free for other work.

    With threads on all cores, which other processes interrupt, training is up to ten times slower.
    """
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) - 1)), **os.environ}


def _programs() -> Path:
    """The directory of `api` and `workers`."""
    root = Path(__file__).resolve().parents[2]
    if not all((root / name / "__main__.py").is_file() for name in ("api", "workers")):
        raise Unavailable(
            "the server programs (api, workers) are not part of the installed library: run the container image, or "
            "clone the repository and run `make install` in it"
        )
    missing = [name for name in ("fastapi", "uvicorn", "sqlalchemy", "torch") if importlib.util.find_spec(name) is None]
    if missing:
        raise Unavailable(
            f"{', '.join(missing)} is not installed: the server needs pip install 'qlora-service[server,train]'"
        )
    return root


def _free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises: Conflict."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # With the server's own option, which ignores lingering connections of an earlier server.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise Conflict(
                f"cannot listen on {host}:{port} ({error.strerror}): stop the process that listens there, or choose "
                "another --port"
            ) from None
        number: int = probe.getsockname()[1]
        return number


def _url_host(host: str) -> str:
    """The host part of a URL with which this machine reaches a server that listens on `host`."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"[{local}]" if ":" in local else local


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that collects the stop signals as they are received."""
    received: list[int] = []

    def record(number: int, _: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, record) for number in stop_signals()}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _ended(processes: dict[str, subprocess.Popen[bytes]]) -> list[tuple[str, int]]:
    """Name and exit code of every process that has ended."""
    codes = ((name, process.poll()) for name, process in processes.items())
    return [(name, code) for name, code in codes if code is not None]


def _stop_all(processes: dict[str, subprocess.Popen[bytes]], received: list[int]) -> None:
    """Ends all processes; kills them after `STOP_S` seconds, or when another signal is received."""
    signals = len(received)
    deadline = time.monotonic() + STOP_S
    for process in processes.values():
        if process.poll() is None:
            process.terminate()
    while len(_ended(processes)) < len(processes):
        if time.monotonic() > deadline or len(received) > max(signals, 1):
            for process in processes.values():
                kill_group(process)
        time.sleep(POLL_S)


def _describe_exit(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
