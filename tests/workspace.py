"""A data directory with the tiny model, real worker processes on it, and look-ups of processes in /proc."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qlora_service.actions.service import Service, open_service
from qlora_service.chat.dispatch import ChatDispatcher
from qlora_service.chat.wire import Finished, GenerationRequest
from qlora_service.domain.jobs import Job
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.queue.claim import Claim
from qlora_service.settings import Settings
from qlora_service.specs import parse_spec
from qlora_service.store.database import Database
from qlora_service.store.inference import LoadedBase

ROOT = Path(__file__).parent.parent
IGNORING_SIGINT = (
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])",
)
"""Prefix of a command that then runs as in the background of a script."""
ROWS = [{"instruction": f"Say {index}", "output": f"The number is {index}."} for index in range(40)]


class Workspace:
    """Service calls in this process, workers in others, all on one data directory."""

    def __init__(self, data_dir: Path, model: Path) -> None:
        # The lease is long enough never to expire on a slow machine: lost jobs are found by other signs.
        self.settings = Settings(data_dir=data_dir, lease_s=600.0, heartbeat_s=0.5)
        self.catalog = Catalog(self.settings.models_dir)
        self.catalog.import_model("tiny", model)
        self.service: Service = open_service(
            database_url=self.settings.resolved_database_url,
            artifact_url=self.settings.resolved_artifact_url,
            models_dir=self.settings.models_dir,
            tmp_dir=self.settings.tmp_dir,
        )

    def submit(self, *, priority: int = 0, **training: Any) -> str:
        """The id of a new queued job on forty short rows."""
        return self.submit_spec(job_spec(**training) | {"priority": priority})

    def submit_spec(self, spec: dict[str, Any]) -> str:
        """The id of a new queued job."""
        return self.service.jobs.submit(parse_spec(spec)).job.id

    def start_worker(self, within: Sequence[str] = (), **settings: str) -> subprocess.Popen[bytes]:
        """`python -m workers` with further environment variables; the caller ends it. `within`: a command prefix."""
        environment = os.environ | {
            "QLORA_DATA_DIR": str(self.settings.data_dir),
            "QLORA_LEASE_S": str(self.settings.lease_s),
            "QLORA_HEARTBEAT_S": str(self.settings.heartbeat_s),
            "OMP_NUM_THREADS": "1",
            **settings,
        }
        command = [*within, sys.executable, "-m", "workers"]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)

    @contextmanager
    def worker(self, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
        """A worker as in `start_worker`, stopped at the end."""
        process = self.start_worker(**settings)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)

    def wait(self, job_id: str, until: Callable[[Job], bool], limit_s: float = 90.0) -> Job:
        """The job once `until` holds."""
        deadline = time.monotonic() + limit_s
        while not until(job := self.service.jobs.get(job_id)):
            assert time.monotonic() < deadline, f"still {job.status}, phase {job.phase}, step {job.step}: {job.error}"
            assert not job.status.terminal, f"ended as {job.status}: {job.error}"
            time.sleep(0.05)
        return job

    def wait_for_end(self, job_id: str) -> Job:
        return self.wait(job_id, lambda job: job.status.terminal)

    def artifact(self, job_id: str, name: str) -> bytes:
        return b"".join(self.service.artifacts.read(self.service.artifacts.get(job_id, name)))

    def adapter_sha256(self, job_id: str) -> str:
        return self.service.artifacts.get(job_id, "adapter_model.safetensors").file.sha256


def chat(workspace: Workspace, base: LoadedBase, request: GenerationRequest) -> tuple[str, Finished]:
    """The text of an answer and its end, where chats may preempt jobs."""

    async def collect() -> tuple[str, Finished]:
        database = Database(workspace.settings.resolved_database_url)
        text, finished = "", None
        async for answer in ChatDispatcher(database, preempts=True).answer(base, request, "local"):
            text, finished = text + (answer.text or ""), answer.finished
        database.close()
        assert finished is not None
        return text, finished

    return asyncio.run(collect())


def job_spec(**training: Any) -> dict[str, Any]:
    """The request of a small job on forty short rows, with dropout, on NF4."""
    settings = {"max_steps": 3, "batch_size": 4, "max_seq_len_tokens": 128, "learning_rate": 1e-2} | training
    return {
        "base_model": "tiny",
        "dataset": {"rows": ROWS},
        "adapter": {"r": 4, "lora_dropout": 0.1},
        "training": settings,
    }


def trainers() -> dict[int, Claim | None]:
    """The claims of this machine's trainer processes, by pid; None for a trainer that is idle or answers chats."""
    claims: dict[int, Claim | None] = {}
    for pid, log in _trainer_logs().items():
        job_id, _, token = log.stem.rpartition("-")
        claims[pid] = Claim(job_id, int(token)) if job_id.startswith("job_") else None
    return claims


def chatting_on(data_dir: Path) -> list[int]:
    """Pids of the processes that answer chats on the data directory."""
    logs = data_dir.resolve() / "logs"
    return [pid for pid, log in _trainer_logs().items() if log.parent == logs and log.name.startswith("inference-")]


def trainers_of(worker: int) -> dict[int, Claim]:
    """The claims of the trainer processes that run attempts for the worker with this pid, by their pids."""
    return {pid: claim for pid, claim in all_trainers_of(worker).items() if claim is not None}


def waiting_trainers_of(worker: int) -> list[int]:
    """Pids of the worker's trainer processes that run no attempt."""
    return [pid for pid, claim in all_trainers_of(worker).items() if claim is None]


def all_trainers_of(worker: int) -> dict[int, Claim | None]:
    """`trainers`, restricted to the children of the worker with this pid."""
    claims = {}
    for pid, claim in trainers().items():
        with suppress(OSError):
            if parent_of(pid) == worker:
                claims[pid] = claim
    return claims


def processes_on(data_dir: Path) -> dict[int, str]:
    """Command lines, by pid, of other processes whose environment or command line names the data directory."""
    commands = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                if str(data_dir).encode() in command + (entry / "environ").read_bytes():
                    commands[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace")
    return commands


def trainer_pids(job_id: str) -> list[int]:
    """Pids of this machine's trainer processes that run an attempt at the job."""
    return [pid for pid, claim in trainers().items() if claim is not None and claim.job_id == job_id]


def parent_of(pid: int) -> int:
    """The pid of the parent process."""
    return int(_status(pid)[1])


def ignored_signals(pid: int) -> set[int]:
    """Numbers of the signals that the process ignores."""
    (mask,) = re.findall(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return {number for number in range(1, signal.NSIG) if int(mask, 16) >> (number - 1) & 1}


def started_at(pid: int) -> float:
    """The start time of the process, on the clock of `time.monotonic`."""
    since_boot_s = int(_status(pid)[19]) / os.sysconf("SC_CLK_TCK")
    return since_boot_s - time.clock_gettime(time.CLOCK_BOOTTIME) + time.monotonic()


def no_trainer_within(job_id: str, limit_s: float) -> bool:
    """Whether the job's trainers end within `limit_s` seconds."""
    deadline = time.monotonic() + limit_s
    while trainer_pids(job_id):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _trainer_logs() -> dict[int, Path]:
    """The log files of this machine's trainer processes, by pid; a log is named after the assignment.

    A child between fork and exec has the command line of its trainer; it is left out.
    """
    logs: dict[int, Path] = {}
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and b"workers.trainer" in (entry / "cmdline").read_bytes().split(b"\0"):
                pid = int(entry.name)
                parents[pid] = parent_of(pid)
                logs[pid] = (entry / "fd" / "1").readlink()
    return {pid: log for pid, log in logs.items() if parents[pid] not in logs}


def _status(pid: int) -> list[str]:
    """Fields of /proc/PID/stat, from the process state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
