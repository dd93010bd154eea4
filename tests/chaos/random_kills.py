"""Random SIGKILLs of trainers, supervisor and API under a stream of jobs: every job must end like an undisturbed one.

A kill is planned when an attempt begins: a phase or step of the job, and whether its trainer or the supervisor is
killed then. So the kills are spread over all phases on fast and slow machines. A trainer that survives its attempt may
run the next one on the base that it has loaded.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import statistics
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from qlora_service.client import Client
from qlora_service.domain.jobs import Job, JobStatus
from qlora_service.errors import Unavailable
from qlora_service.queue.claim import Claim
from tests.chaos._verdict import check_jobs, job_ids, leftovers, orphans
from tests.running_api import RunningApi
from tests.workspace import Workspace, job_spec, started_at, trainers_of

STEPS = 6
SLOTS = 2
OPEN_JOBS = 3
"""Jobs that are queued or running at a time: one is queued while the slots are taken"""
TICK_S = 0.05
STUCK_AFTER_S = 180.0
"""Jobs are stuck if none has ended for this time after the last kill"""
PHASES = ("starting", "rendering", "loading", "training", "publishing", "certifying")
LATER_PHASES = [1, 2, 3, 3, 3, 4, 5]
"""Indexes into PHASES; training is the longest phase after the start"""
WORKER = {"QLORA_SLOTS": str(SLOTS), "QLORA_CHECKPOINT_S": "0", "QLORA_MAX_DEATHS": "10000", "QLORA_LEASE_S": "6"}


class Victim(StrEnum):
    TRAINER = "trainer"
    SUPERVISOR = "supervisor"
    API = "api"


SHARES = {Victim.API: 0.45, Victim.SUPERVISOR: 0.2, Victim.TRAINER: 0.35}


@dataclass(frozen=True)
class Survival:
    """Outcome of the kills: correct if `lost`, `stuck`, `published_twice` and `wrong` are empty."""

    kills: dict[str, int]
    """By victim"""
    kills_by_phase: dict[str, int]
    """Kills of trainers and supervisors, by the job's phase"""
    jobs: int
    lost: list[str]
    """Acknowledged jobs that do not exist or have not succeeded"""
    stuck: list[str]
    published_twice: list[str]
    wrong: list[str]
    """Every other difference from an undisturbed run"""
    respawn_s: list[float]
    """From a trainer's SIGKILL to the existence of the next trainer of its job"""
    import_s: float
    """From a claim until the trainer has imported torch: median over all attempts that imported it"""
    base_load_s: float
    """Time to load the base: median over all attempts that loaded it"""
    seconds: float


@dataclass
class _PlannedKill:
    """A kill `delay_s` seconds after the job was first seen in a phase or step."""

    victim: Victim
    phase: int
    step: int
    delay_s: float
    due_at: float | None = None

    def is_due(self, job: Job, now: float) -> bool:
        phase = PHASES.index(job.phase) if job.phase in PHASES else 0
        reached = phase > self.phase or (phase == self.phase and job.step >= self.step)
        if self.due_at is None and reached:
            self.due_at = now + self.delay_s
        return self.due_at is not None and now >= self.due_at


def run(workspace: Workspace, kills: int, *, seed: int = 0) -> Survival:
    """Kills `kills` processes of a service on the workspace, and checks all jobs after their end."""
    started = time.monotonic()
    with RunningApi(workspace.settings.data_dir) as api:
        killer = _Killer(workspace, api, kills, random.Random(seed))
        reference, posted = killer.kill_all()
        stuck = _drain(workspace, posted)
        killer.worker.send_signal(signal.SIGTERM)
        killer.worker.wait(30)
        # The next processes remove the leftovers of killed ones when they start.
        api.stop()
        api.start()
        with workspace.worker(**WORKER):
            wrong = leftovers(workspace, limit_s=20)
    wrong += orphans(workspace.settings.data_dir, limit_s=10)
    verdict = check_jobs(workspace, reference, [job_id for job_id in posted if job_id not in stuck], STEPS)
    wrong += [f"{job_id}: no client posted it" for job_id in sorted(job_ids(workspace) - {reference, *posted})]
    import_s, base_load_s = _phase_seconds(workspace, posted)
    return Survival(
        kills={victim.value: killer.kills[victim] for victim in Victim},
        kills_by_phase=dict(killer.phases),
        jobs=len(posted),
        lost=verdict.lost,
        stuck=stuck,
        published_twice=verdict.published_twice,
        wrong=wrong + verdict.wrong,
        respawn_s=killer.respawn_s,
        import_s=import_s,
        base_load_s=base_load_s,
        seconds=round(time.monotonic() - started, 1),
    )


@dataclass
class _Killer:
    """Posts jobs to a running service and kills its processes."""

    workspace: Workspace
    api: RunningApi
    total_kills: int
    generator: random.Random
    kills: Counter[Victim] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    respawn_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.worker = self.workspace.start_worker(**WORKER)
        self._posted: list[str] = []
        self._all_killed = threading.Event()
        self._planned: dict[Claim, _PlannedKill | None] = {}
        self._killed_at: dict[str, float] = {}
        """Time at which the trainer of a job was killed, until its next trainer is seen"""
        self._api_kill_at: float | None = None
        self._worker_kill_at: float | None = None
        self._kill_next_attempt = False
        """Whether the next attempt's trainer is killed at its start, too"""
        self._import_s = 0.0
        """Time that a trainer takes to import torch"""

    def kill_all(self) -> tuple[str, list[str]]:
        """The ids of an undisturbed job, which ends before the first kill, and of the jobs posted during the kills."""
        try:
            undisturbed = self.workspace.submit_spec(job_spec(max_steps=STEPS))
            self.workspace.wait_for_end(undisturbed)
            self._import_s, _ = _phase_seconds(self.workspace, [undisturbed])
            with ThreadPoolExecutor(1) as pool:
                posting = pool.submit(self._post)
                try:
                    while any(self._has_kills_left(victim) for victim in Victim):
                        assert not posting.done(), posting.exception()
                        self._tick(time.monotonic())
                        time.sleep(TICK_S)
                finally:
                    self._all_killed.set()
                posting.result()
        except BaseException:
            self.worker.kill()
            self.worker.wait()
            raise
        return undisturbed, self._posted

    def _has_kills_left(self, victim: Victim) -> bool:
        return self.kills[victim] < round(self.total_kills * SHARES[victim])

    def _post(self) -> None:
        """Keeps OPEN_JOBS jobs queued or running, through the API."""
        open_jobs: set[str] = set()
        key = str(uuid.uuid4())
        with Client(self.api.url, patience_s=STUCK_AFTER_S) as client:
            while not self._all_killed.wait(TICK_S):
                open_jobs = set(_unfinished(self.workspace, open_jobs))
                if len(open_jobs) < OPEN_JOBS:
                    # On a busy machine the API may be down for longer than the client retries. The next request has
                    # the same key, because the last one may have been stored.
                    with suppress(Unavailable):
                        job_id = client.submit(job_spec(max_steps=STEPS), idempotency_key=key).id
                        self._posted.append(job_id)
                        open_jobs.add(job_id)
                        key = str(uuid.uuid4())

    def _tick(self, now: float) -> None:
        """Plans kills of new attempts, and executes the kills that are due."""
        self._kill_api(now)
        if self._worker_kill_at is not None and now >= self._worker_kill_at:
            self._kill_worker(now)
            return
        for pid, claim in trainers_of(self.worker.pid).items():
            if claim not in self._planned:
                self._planned[claim] = self._plan_kill()
                if (killed_at := self._killed_at.pop(claim.job_id, None)) is not None:
                    with suppress(FileNotFoundError):
                        self.respawn_s.append(started_at(pid) - killed_at)
            kill, job = self._planned[claim], self.workspace.service.jobs.get(claim.job_id)
            if kill is None or job.attempt != claim.token or not kill.is_due(job, now):
                continue
            if not self._has_kills_left(kill.victim):
                continue
            self.phases[job.phase or "ended"] += 1
            if kill.victim is Victim.SUPERVISOR:
                self._kill_worker(now)
                return
            self._kill_trainer(pid, claim)

    def _plan_kill(self) -> _PlannedKill | None:
        """A kill for a new attempt, mostly in its phases before training, which take longest; None for some."""
        if self._kill_next_attempt:
            self._kill_next_attempt = False
            return _PlannedKill(Victim.TRAINER, 0, 0, self.generator.uniform(0, 1))
        victims = [victim for victim in (Victim.TRAINER, Victim.SUPERVISOR) if self._has_kills_left(victim)]
        if not victims or self.generator.random() < 0.15:
            return None
        victim = self.generator.choices(victims, [SHARES[victim] for victim in victims])[0]
        if self.generator.random() < 0.6:
            return _PlannedKill(victim, 0, 0, self.generator.uniform(0, self._import_s))
        phase = self.generator.choice(LATER_PHASES)
        step = self.generator.randrange(STEPS) if PHASES[phase] == "training" else 0
        return _PlannedKill(victim, phase, step, self.generator.uniform(0, 0.2))

    def _kill_trainer(self, pid: int, claim: Claim) -> None:
        self._planned[claim] = None
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed_at = time.monotonic()
            self.kills[Victim.TRAINER] += 1
            self._kill_next_attempt = self.generator.random() < 0.5
            if not self.workspace.service.jobs.get(claim.job_id).status.terminal:
                self._killed_at[claim.job_id] = killed_at

    def _kill_worker(self, now: float) -> None:
        """Kills and restarts the worker; half of the time plans another kill while the next one starts."""
        self.worker.kill()
        self.worker.wait()
        self.kills[Victim.SUPERVISOR] += 1
        self._killed_at.clear()
        self.worker = self.workspace.start_worker(**WORKER)
        again = self._has_kills_left(Victim.SUPERVISOR) and self.generator.random() < 0.5
        self._worker_kill_at = now + self.generator.uniform(0, 2) if again else None

    def _kill_api(self, now: float) -> None:
        """Kills and restarts the API if it is due: half of the time while it starts, else within 2 s of listening."""
        if not self._has_kills_left(Victim.API):
            return
        if self._api_kill_at is not None and now >= self._api_kill_at:
            self.api.stop(signal.SIGKILL)
            self.kills[Victim.API] += 1
            self.api.launch()
            self._api_kill_at = now + self.generator.uniform(0, 1) if self.generator.random() < 0.5 else None
        elif self._api_kill_at is None and _listens(self.api.port):
            self._api_kill_at = now + self.generator.uniform(0, 2)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _unfinished(workspace: Workspace, job_ids: Iterable[str]) -> list[str]:
    return [job_id for job_id in job_ids if not workspace.service.jobs.get(job_id).status.terminal]


def _drain(workspace: Workspace, posted: list[str]) -> list[str]:
    """Waits for the end of all jobs; those that have not ended when no job has ended for STUCK_AFTER_S."""
    open_jobs, deadline = posted, time.monotonic() + STUCK_AFTER_S
    while open_jobs and time.monotonic() < deadline:
        time.sleep(TICK_S)
        still_open = _unfinished(workspace, open_jobs)
        if still_open != open_jobs:
            open_jobs, deadline = still_open, time.monotonic() + STUCK_AFTER_S
    return open_jobs


def _phase_seconds(workspace: Workspace, job_ids: list[str]) -> tuple[float, float]:
    """Median seconds from claim to rendering, and from loading to training."""
    imports, loads = list[float](), list[float]()
    for job_id in job_ids:
        begin: datetime | None = None
        for event in workspace.service.jobs.events(job_id):
            message = event.data.get("message")
            if message in {"rendering", "training"} and begin is not None:
                (imports if message == "rendering" else loads).append((event.at - begin).total_seconds())
            begins = event.data.get("status") == JobStatus.RUNNING or message == "loading"
            begin = event.at if begins else None
    return statistics.median(imports or [0.0]), statistics.median(loads or [0.0])
