"""Trainers, supervisor and API are killed at random moments of a stream of jobs; every job must end as if undisturbed.

An attempt's doom is drawn when it begins: a moment of a job's life, and whether its trainer or the supervisor is killed
then. So the kills are spread over a job's life, however fast the machine is. A trainer that survives its attempt may
have the next one, on the base that it has loaded.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from qlora_service.client import Client
from qlora_service.domain.jobs import Job, JobStatus
from qlora_service.errors import Unavailable
from qlora_service.queue.claim import Claim
from tests.chaos._verdict import job_ids, judge, leftovers, orphans
from tests.running_api import RunningApi
from tests.workspace import Workspace, job_spec, started_at, trainers_of

STEPS = 6
SLOTS = 2
UNDER_WAY = 3
"""Jobs that are queued or running at a time: one waits while the slots are taken."""
TICK_S = 0.05
PATIENCE_S = 180.0
"""Without a job's end for so long after the last kill, what is left is stuck."""
PHASES = ("starting", "rendering", "loading", "training", "publishing", "certifying")
LATER_PHASES = [1, 2, 3, 3, 3, 4, 5]
"""Indexes into PHASES; after the start, training takes longest."""
WORKER = {"QLORA_SLOTS": str(SLOTS), "QLORA_CHECKPOINT_S": "0", "QLORA_MAX_DEATHS": "10000", "QLORA_LEASE_S": "6"}


class Victim(StrEnum):
    TRAINER = "trainer"
    SUPERVISOR = "supervisor"
    API = "api"


SHARES = {Victim.API: 0.45, Victim.SUPERVISOR: 0.2, Victim.TRAINER: 0.35}


@dataclass(frozen=True)
class Survival:
    """What came of the kills. Nothing went wrong when every list is empty."""

    kills: dict[str, int]
    kills_by_phase: dict[str, int]
    """Where trainers were when they, or their supervisor, were killed"""
    jobs: int
    lost: list[str]
    """Jobs that were acknowledged and are not there, or whose outcome is another than success"""
    stuck: list[str]
    published_twice: list[str]
    wrong: list[str]
    """Everything else that is not as after an undisturbed run"""
    respawn_s: list[float]
    """From a trainer's SIGKILL to the existence of the next trainer of its job"""
    import_s: float
    """From a claim until the trainer has imported torch: the median over all attempts that got so far"""
    base_load_s: float
    seconds: float


@dataclass
class _Doom:
    """A moment of a job's life, and who is killed then; it comes `delay_s` after the phase or step was seen."""

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
    """Kills so many processes of a service on the workspace, and judges what is left when all its jobs have ended."""
    started = time.monotonic()
    with RunningApi(workspace.settings.data_dir) as api:
        havoc = _Havoc(workspace, api, kills, random.Random(seed))
        reference, posted = havoc.rage()
        stuck = _drain(workspace, posted)
        havoc.worker.send_signal(signal.SIGTERM)
        havoc.worker.wait(30)
        # What killed processes left is removed when the next ones start.
        api.stop()
        api.start()
        with workspace.worker(**WORKER):
            wrong = leftovers(workspace, limit_s=20)
    wrong += orphans(workspace.settings.data_dir, limit_s=10)
    verdict = judge(workspace, reference, [job_id for job_id in posted if job_id not in stuck], STEPS)
    wrong += [f"{job_id}: nobody posted it" for job_id in sorted(job_ids(workspace) - {reference, *posted})]
    import_s, base_load_s = _phase_seconds(workspace, posted)
    return Survival(
        kills={victim.value: havoc.kills[victim] for victim in Victim},
        kills_by_phase=dict(havoc.phases),
        jobs=len(posted),
        lost=verdict.lost,
        stuck=stuck,
        published_twice=verdict.published_twice,
        wrong=wrong + verdict.wrong,
        respawn_s=havoc.respawn_s,
        import_s=import_s,
        base_load_s=base_load_s,
        seconds=round(time.monotonic() - started, 1),
    )


@dataclass
class _Havoc:
    """A running service, and who kills it."""

    workspace: Workspace
    api: RunningApi
    budget: int
    chance: random.Random
    kills: Counter[Victim] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    respawn_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.worker = self.workspace.start_worker(**WORKER)
        self._posted: list[str] = []
        self._over = threading.Event()
        self._dooms: dict[Claim, _Doom | None] = {}
        self._bereft: dict[str, float] = {}  # jobs without a trainer, and since when
        self._api_end: float | None = None
        self._worker_end: float | None = None
        self._in_succession = False
        self._import_s = 0.0  # how long a trainer takes before it begins with its job

    def rage(self) -> tuple[str, list[str]]:
        """Kills until all kills are made; the ids of a job before, undisturbed, and of those posted meanwhile."""
        try:
            undisturbed = self.workspace.submit_spec(job_spec(max_steps=STEPS))
            self.workspace.wait_for_end(undisturbed)
            self._import_s, _ = _phase_seconds(self.workspace, [undisturbed])
            with ThreadPoolExecutor(1) as pool:
                posting = pool.submit(self._post)
                try:
                    while self._any_left():
                        assert not posting.done(), posting.exception()
                        self._tick(time.monotonic())
                        time.sleep(TICK_S)
                finally:
                    self._over.set()
                posting.result()
        except BaseException:
            self.worker.kill()
            self.worker.wait()
            raise
        return undisturbed, self._posted

    def _left(self, victim: Victim) -> bool:
        return self.kills[victim] < round(self.budget * SHARES[victim])

    def _any_left(self) -> bool:
        return any(self._left(victim) for victim in Victim)

    def _post(self) -> None:
        """Keeps enough jobs under way, through the API."""
        running: set[str] = set()
        key = str(uuid.uuid4())
        with Client(self.api.url, patience_s=PATIENCE_S) as client:
            while not self._over.wait(TICK_S):
                running = {job_id for job_id in running if not self.workspace.service.jobs.get(job_id).status.terminal}
                if len(running) < UNDER_WAY:
                    # A busy machine may not bring the API up for longer than the client sends a request again, and
                    # what was sent may have arrived: it is the same job that is posted then.
                    with suppress(Unavailable):
                        job_id = client.submit(job_spec(max_steps=STEPS), idempotency_key=key).id
                        self._posted.append(job_id)
                        running.add(job_id)
                        key = str(uuid.uuid4())

    def _tick(self, now: float) -> None:
        self._look_after_api(now)
        if self._worker_end is not None and now >= self._worker_end:
            self._kill_worker(now)
            return
        for pid, claim in trainers_of(self.worker.pid).items():
            if claim not in self._dooms:
                self._dooms[claim] = self._draw_doom()
                if (since := self._bereft.pop(claim.job_id, None)) is not None:
                    with suppress(FileNotFoundError):
                        self.respawn_s.append(started_at(pid) - since)
            doom, job = self._dooms[claim], self.workspace.service.jobs.get(claim.job_id)
            if doom is None or job.attempt != claim.token or not doom.is_due(job, now) or not self._left(doom.victim):
                continue
            self.phases[job.phase or "ended"] += 1
            if doom.victim is Victim.SUPERVISOR:
                self._kill_worker(now)
                return
            self._kill_trainer(pid, claim)

    def _draw_doom(self) -> _Doom | None:
        """A new attempt's: mostly somewhere in the phases before training, which take longest; sometimes none."""
        if self._in_succession:
            self._in_succession = False
            return _Doom(Victim.TRAINER, 0, 0, self.chance.uniform(0, 1))
        weights = {victim: SHARES[victim] for victim in (Victim.TRAINER, Victim.SUPERVISOR) if self._left(victim)}
        if not weights or self.chance.random() < 0.15:
            return None
        victim = self.chance.choices(list(weights), list(weights.values()))[0]
        if self.chance.random() < 0.6:
            return _Doom(victim, 0, 0, self.chance.uniform(0, self._import_s))
        phase = self.chance.choice(LATER_PHASES)
        step = self.chance.randrange(STEPS) if PHASES[phase] == "training" else 0
        return _Doom(victim, phase, step, self.chance.uniform(0, 0.2))

    def _kill_trainer(self, pid: int, claim: Claim) -> None:
        self._dooms[claim] = None
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed_at = time.monotonic()
            self.kills[Victim.TRAINER] += 1
            self._in_succession = self.chance.random() < 0.5
            if not self.workspace.service.jobs.get(claim.job_id).status.terminal:
                self._bereft[claim.job_id] = killed_at

    def _kill_worker(self, now: float) -> None:
        """And sometimes once more while the next one starts."""
        self.worker.kill()
        self.worker.wait()
        self.kills[Victim.SUPERVISOR] += 1
        self._bereft.clear()
        self.worker = self.workspace.start_worker(**WORKER)
        again = self._left(Victim.SUPERVISOR) and self.chance.random() < 0.5
        self._worker_end = now + self.chance.uniform(0, 2) if again else None

    def _look_after_api(self, now: float) -> None:
        """Half of the kills are while it starts, half within two seconds after it listens."""
        if not self._left(Victim.API):
            return
        if self._api_end is not None and now >= self._api_end:
            self.api.stop(signal.SIGKILL)
            self.kills[Victim.API] += 1
            self.api.launch()
            self._api_end = now + self.chance.uniform(0, 1) if self.chance.random() < 0.5 else None
        elif self._api_end is None and _listens(self.api.port):
            self._api_end = now + self.chance.uniform(0, 2)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _drain(workspace: Workspace, posted: list[str]) -> list[str]:
    """Waits until all jobs have ended; those that have not when none has ended for too long."""
    open_jobs, deadline = posted, time.monotonic() + PATIENCE_S
    while open_jobs and time.monotonic() < deadline:
        time.sleep(TICK_S)
        still_open = [job_id for job_id in open_jobs if not workspace.service.jobs.get(job_id).status.terminal]
        if still_open != open_jobs:
            open_jobs, deadline = still_open, time.monotonic() + PATIENCE_S
    return open_jobs


def _phase_seconds(workspace: Workspace, job_ids: list[str]) -> tuple[float, float]:
    """Median seconds from claim to rendering, and from loading to training."""
    imports, loads = list[float](), list[float]()
    for job_id in job_ids:
        begun: datetime | None = None
        for event in workspace.service.jobs.events(job_id):
            message = event.data.get("message")
            if message in {"rendering", "training"} and begun is not None:
                (imports if message == "rendering" else loads).append((event.at - begun).total_seconds())
            begins = event.data.get("status") == JobStatus.RUNNING or message == "loading"
            begun = event.at if begins else None
    return statistics.median(imports or [0.0]), statistics.median(loads or [0.0])
