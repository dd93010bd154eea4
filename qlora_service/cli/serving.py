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
from qlora_service.process import child as lifeline

STOP_S = 20.0
"""What the API and the worker have to end in. The worker kills a trainer that has not stopped after 8 s, and may then
wait 10 s for a locked database to give the job back; the API ends within 4 s."""
POLL_S = 0.1


def serve(*, host: str, port: int, data_dir: Path, say: Callable[[str], None]) -> int:
    """The exit code: 0 when it was asked to stop (SIGINT, SIGTERM), 1 when the API or the worker ended by itself.

    A second signal kills both at once.

    Raises:
        Unavailable: the programs or what they import are not installed.
        Conflict: something else listens on the port.
    """
    root = _programs()
    port = _free_port(host, port)
    url = f"http://{_reachable(host)}:{port}"
    told = {"QLORA_HOST": host, "QLORA_PORT": str(port), "QLORA_DATA_DIR": str(data_dir)}
    environment = environment_of_children() | told
    processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(name: str) -> None:
        processes[name] = lifeline.start_python(["-m", name], environment=environment, directory=root)

    with _stop_signals() as received, Client(url) as client:
        try:
            start("api")
            while not received and not _ended(processes) and not client.healthy():
                time.sleep(POLL_S)
            if not received and not _ended(processes):
                # Only now: the API has brought the database's schema up to date.
                start("workers")
                say(f"qlora-service listens at {url}; its documentation is at {url}/docs; data in {data_dir}")
            while not received and not _ended(processes):
                time.sleep(POLL_S)
            failures = [] if received else _ended(processes)
            if received:
                say("Stopping. A job that is running saves its steps, and goes on from there at the next start.")
        finally:
            _stop_all(processes, received)
    for name, code in failures:
        say(f"python -m {name} ended with {_outcome(code)}; its messages are above. Everything is stopped.")
    return 1 if failures else 0


def pick_port(host: str) -> int:
    """A port that is free now."""
    return _free_port(host, 0)


def _programs() -> Path:
    """The directory that holds `api` and `workers`."""
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
        # As the server will bind: connections of a predecessor that still linger are no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise Conflict(
                f"cannot listen on {host}:{port} ({error.strerror}): stop what listens there, or choose another --port"
            ) from None
        number: int = probe.getsockname()[1]
        return number


def _reachable(host: str) -> str:
    """The host part of an address at which this machine reaches what listens on `host`."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"[{local}]" if ":" in local else local


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def environment_of_children() -> dict[str, str]:
    """Ours, with one core left free: threads that have to share all of them are up to ten times slower."""
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) - 1)), **os.environ}


def _ended(processes: dict[str, subprocess.Popen[bytes]]) -> list[tuple[str, int]]:
    """Name and exit code of every process that has ended."""
    codes = ((name, process.poll()) for name, process in processes.items())
    return [(name, code) for name, code in codes if code is not None]


def _stop_all(processes: dict[str, subprocess.Popen[bytes]], received: list[int]) -> None:
    """Returns when all have ended, killed when the time is up or one more signal came."""
    signals = len(received)
    deadline = time.monotonic() + STOP_S
    for process in processes.values():
        if process.poll() is None:
            process.terminate()
    while len(_ended(processes)) < len(processes):
        if time.monotonic() > deadline or len(received) > max(signals, 1):
            for process in processes.values():
                lifeline.kill_group(process)
        time.sleep(POLL_S)


def _outcome(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
