"""Jobs killed after each of their steps and resumed by another process: all must publish the same adapter.

`python -m tests.chaos.resume_every_step DATA_DIR '{"job_…": 3, …}'` runs the queued jobs of a data directory, and kills
the first attempt of each after the given step. It imports torch once and forks a process per attempt.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_service.domain.jobs import JobStatus
from qlora_service.queue.claim import Claim
from qlora_service.queue.queue import Queue
from qlora_service.settings import Settings
from qlora_service.store.database import Database
from tests.chaos._verdict import check_jobs
from tests.workspace import ROOT, Workspace, job_spec

OPTIMIZERS = ("paged_adamw_32bit", "paged_adamw_8bit")
CONCURRENT_ATTEMPTS = 2
# Rank 64 gives weights of 64 x 64 elements: bitsandbytes keeps the states of smaller ones in 32 bits.
ADAPTER = {"r": 64, "lora_dropout": 0.1}


@dataclass(frozen=True)
class Resumed:
    """Outcome of the kills: correct if `wrong` is empty."""

    resumed: int
    """Jobs that were killed once and succeeded in their second attempt"""
    wrong: list[str]
    adapters: dict[str, int]
    """Number of different adapters per optimizer, including that of the undisturbed job"""
    seconds: float


def run(workspace: Workspace, steps: int, optimizers: Sequence[str] = OPTIMIZERS) -> Resumed:
    """Runs jobs of `steps` steps with each optimizer: one undisturbed, and one killed after each step."""
    started = time.monotonic()
    jobs: dict[str, list[str]] = {}
    for optim in optimizers:
        spec = job_spec(max_steps=steps, optim=optim) | {"adapter": ADAPTER}
        jobs[optim] = [workspace.submit_spec(spec) for _ in range(steps + 1)]
    kills = {job_id: step for ids in jobs.values() for step, job_id in enumerate(ids)}
    command = [sys.executable, "-m", "tests.chaos.resume_every_step", str(workspace.settings.data_dir)]
    log = workspace.settings.data_dir / "attempts.log"
    with log.open("wb") as output:
        server = subprocess.run(
            [*command, json.dumps(kills)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
        )
    assert server.returncode == 0, log.read_text()
    wrong, resumed, adapters = list[str](), 0, dict[str, int]()
    for optim, (undisturbed, *killed) in jobs.items():
        verdict = check_jobs(workspace, undisturbed, killed, steps)
        wrong += [f"{optim}, {fault}" for fault in verdict.lost + verdict.published_twice + verdict.wrong]
        ended = [workspace.service.jobs.get(job_id) for job_id in (undisturbed, *killed)]
        succeeded = [job for job in ended if job.status is JobStatus.SUCCEEDED]
        resumed += sum(job.attempt == 2 for job in succeeded)
        adapters[optim] = len({workspace.adapter_sha256(job.id) for job in succeeded})
    return Resumed(resumed, wrong, adapters, round(time.monotonic() - started, 1))


def serve(data_dir: Path, kills: dict[str, int]) -> None:
    """Runs queued jobs until none is left, as a supervisor of forked trainers."""
    import workers.trainer.attempt
    import workers.trainer.trainer  # noqa: F401 - with torch, once for all attempts

    settings = Settings(data_dir=data_dir, lease_s=600, heartbeat_s=5, checkpoint_s=0)
    lifeline, held_end = socket.socketpair()
    running: dict[int, Claim] = {}
    while True:
        # Closed before the fork: SQLite's locks break if two processes have the same connection open.
        database = Database(settings.resolved_database_url)
        queue = Queue(database, lease_s=settings.lease_s)
        claimed = queue.claim("forks") if len(running) < CONCURRENT_ATTEMPTS else None
        database.close()
        if claimed is not None:
            claim, _ = claimed
            pid = os.fork()
            if pid == 0:
                held_end.close()
                _attempt(claim, kills[claim.job_id] if claim.token == 1 else 0, settings, lifeline)
            running[pid] = claim
        elif running:
            pid, _ = os.wait()
            claim = running.pop(pid)
            if queue.is_running(claim):
                queue.died(claim, {"message": "killed"})
            database.close()
        else:
            return


def _attempt(claim: Claim, kill_after: int, settings: Settings, lifeline: socket.socket) -> None:
    """The forked process: a trainer that kills itself after step `kill_after`; 0 for never. Does not return."""
    from qlora_service.training.loop import StepMetrics
    from workers.supervisor_channel import SupervisorChannel
    from workers.trainer import trainer
    from workers.trainer.reporter import JobReporter

    class Mortal(JobReporter):
        def on_step(self, metrics: StepMetrics) -> None:
            super().on_step(metrics)
            if metrics.step == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)

    code = 1
    try:
        setattr(trainer, "JobReporter", Mortal)  # noqa: B010 - a name that the trainer does not export
        channel = SupervisorChannel(lifeline)
        channel.start()
        trainer.Trainer("cpu", settings, channel).run(claim)
        code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), json.loads(sys.argv[2]))
