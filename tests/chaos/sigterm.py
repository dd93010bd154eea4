"""Workers stopped by SIGTERM at random moments: no completed step may be lost, and the worker ends within 8 seconds.

The worker runs two jobs: one with steps and evaluations that take seconds, so that most stops are in the middle of one,
and a short one, so that some stops are while it publishes. Both resume in the next worker.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from qlora_service.domain.jobs import Job, JobStatus
from tests.workspace import Workspace, job_spec, trainers_of

ROWS = [{"instruction": f"Count to {n}", "output": " ".join(map(str, range(n % 40, n % 40 + 20)))} for n in range(600)]
IMPORT_S = 4.0
"""Approximate time that a trainer takes to import its libraries"""


@dataclass(frozen=True)
class Stops:
    """Outcome of the stops."""

    trainers: int
    """Number of stopped trainers"""
    lost_steps: int
    """Steps that were reported and are in no checkpoint"""
    exit_s: list[float]
    """From SIGTERM to the worker's end"""
    wrong: list[str]
    """Workers and jobs that did not end as expected"""
    phases: dict[str, int]
    """Number of stops by the job's phase"""
    seconds: float


def run(workspace: Workspace, times: int, *, seed: int = 0) -> Stops:
    """Starts and stops a worker `times` times."""
    started, generator = time.monotonic(), random.Random(seed)
    slow, short = workspace.submit_spec(_slow_spec()), workspace.submit(max_steps=4)
    lost, trainers, exit_s, wrong, phases = 0, 0, list[float](), list[str](), Counter[str]()
    for number in range(times):
        with workspace.worker(QLORA_SLOTS="2", QLORA_LEASE_S="30") as worker:
            _wait_for_moment(workspace, worker.pid, (slow, short), number, generator)
            running = {claim.job_id for claim in trainers_of(worker.pid).values()}
            phases.update(workspace.service.jobs.get(job_id).phase or "ended" for job_id in running)
            trainers += len(running)
            worker.send_signal(signal.SIGTERM)
            stopped_at = time.monotonic()
            code = worker.wait(60)
            exit_s.append(round(time.monotonic() - stopped_at, 2))
        if code != 0:
            wrong.append(f"the worker ended with exit code {code}")
        for job_id in (slow, short):
            job = workspace.service.jobs.get(job_id)
            lost += _last_step(workspace, job_id) - job.checkpoint_step
            if job.deaths or job.status not in {JobStatus.QUEUED, JobStatus.SUCCEEDED}:
                wrong.append(f"{job_id} is {job.status} after {len(job.deaths)} deaths: {job.error}")
        if workspace.service.jobs.get(short).status.terminal:
            short = workspace.submit(max_steps=4)
        if wrong:
            break
    return Stops(trainers, lost, exit_s, wrong, dict(phases), round(time.monotonic() - started, 1))


def _slow_spec() -> dict[str, Any]:
    """A job with steps of 300 rows, each followed by an evaluation on 300 rows."""
    spec = job_spec(max_steps=10_000, batch_size=300, micro_batch_tokens=128)
    return spec | {
        "dataset": {"rows": ROWS},
        "validation": {"fraction": 0.5, "max_rows": 300},
        "evaluation": {"every_steps": 1},
    }


def _wait_for_moment(
    workspace: Workspace, worker: int, job_ids: tuple[str, str], number: int, generator: random.Random
) -> None:
    """Returns at a random moment of, in turn, the slow steps and evaluations, publishing, and the trainers' start."""
    slow, short = job_ids
    deadline = time.monotonic() + 120

    def wait_for(job_id: str, phases: set[str]) -> None:
        while not _has_reached(workspace.service.jobs.get(job_id), phases):
            assert time.monotonic() < deadline, workspace.service.jobs.get(job_id)
            time.sleep(0.01)

    if number % 3 == 0:
        wait_for(slow, {"training"})
        time.sleep(generator.uniform(0, 4))
    elif number % 3 == 1:
        wait_for(short, {"publishing", "certifying"})
        time.sleep(generator.uniform(0, 0.2))
    else:
        while len(trainers_of(worker)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(generator.uniform(0, IMPORT_S))


def _has_reached(job: Job, phases: set[str]) -> bool:
    """Whether the job is in one of the phases, or has ended."""
    return job.status.terminal or job.phase in phases


def _last_step(workspace: Workspace, job_id: str) -> int:
    """The last step in the job's metrics; 0 before the first."""
    return max((record["step"] for record in workspace.service.jobs.metrics(job_id) if "loss" in record), default=0)
