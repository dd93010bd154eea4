"""Supervisor and trainers stand still past the lease, another worker takes their jobs, they go on: nothing they write
may be accepted, and they have to be gone soon.

Two workers with locks of their own, so that nobody ends a zombie but itself, hand the jobs to and fro: whoever has them
is stopped at a random moment, and goes on when the other has claimed them all.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qlora_service.domain.jobs import JobEvent, JobStatus
from qlora_service.queue.claim import Claim
from tests.workspace import Workspace, trainers_of

JOBS = 5
LEASE_S = 3.0
UNAWARE_LEASE_S = 60.0
LIFE_S = (0.0, 1.5)
"""How long trainers live before they are stopped, most of the time: they have a claim before they import torch"""
GONE_WITHIN_S = 10.0


@dataclass(frozen=True)
class Zombies:
    """What came of it."""

    zombies: int
    """Trainers that stood still past their lease; as many again did not know that it was over"""
    unaware: int
    """Trainers that stood still only while their lease was taken from them, and believed that they had it"""
    writes_accepted: list[str]
    phases: dict[str, int]
    """Where they were stopped"""
    gone_s: float
    """The longest that a zombie lived on"""
    seconds: float


def run(workspace: Workspace, times: int, *, seed: int = 0) -> Zombies:
    """Makes at least so many zombies, and about a quarter as many that are unaware."""
    started, chance = time.monotonic(), random.Random(seed)
    jobs = [workspace.submit(max_steps=100_000) for _ in range(JOBS)]
    rounds = _Rounds(workspace, jobs, chance)
    with rounds.workers(LEASE_S):
        while rounds.zombies < times:
            # Once in a while they get as far as training.
            rounds.turn(train=rounds.zombies % 20 >= 20 - JOBS)
    zombies = rounds.zombies
    with rounds.workers(UNAWARE_LEASE_S):
        while rounds.zombies < times + times // 4:
            rounds.turn(take_lease=True)
    for job_id in jobs:
        workspace.service.jobs.cancel(job_id)
    return Zombies(
        zombies=zombies,
        unaware=rounds.zombies - zombies,
        writes_accepted=[fault for job_id in jobs for fault in accepted_writes(workspace, job_id)],
        phases=dict(rounds.phases),
        gone_s=round(rounds.gone_s, 2),
        seconds=round(time.monotonic() - started, 1),
    )


def accepted_writes(workspace: Workspace, job_id: str) -> list[str]:
    """Events of a job that an older attempt than the current one wrote, or its supervisor."""
    found, current = list[str](), 0
    for event in workspace.service.jobs.events(job_id):
        if event.data.get("status") == JobStatus.RUNNING:
            current = event.data["attempt"]
        elif _writer(job_id, event, current) != current:
            found.append(f"{job_id}, event {event.seq} while attempt {current} ran: {event.data}")
    return found


def _writer(job_id: str, event: JobEvent, current: int) -> int:
    """The attempt that an event is of: by its number, or by the log file that a supervisor names."""
    if "attempt" in event.data:
        return int(event.data["attempt"])
    _, log, rest = str(event.data.get("reason", "")).partition(f"{job_id}-")
    return int(rest.partition(".")[0]) if log else current


class _Rounds:
    def __init__(self, workspace: Workspace, jobs: list[str], chance: random.Random) -> None:
        self._workspace, self._jobs, self._chance = workspace, jobs, chance
        self._owner: subprocess.Popen[bytes]
        self._heir: subprocess.Popen[bytes]
        self.zombies = 0
        self.gone_s = 0.0
        self.phases: Counter[str] = Counter()

    @contextmanager
    def workers(self, lease_s: float) -> Iterator[None]:
        """Two workers: the one that has the jobs, and one with as many slots that is about to inherit them."""
        with ExitStack() as stack:
            self._owner = stack.enter_context(self._worker("owner", lease_s))
            self._until(lambda: len(trainers_of(self._owner.pid)) == JOBS)
            self._heir = stack.enter_context(self._worker("heir", lease_s))
            try:
                yield
            finally:
                self._awaken([self._owner.pid, self._heir.pid])

    def _worker(self, name: str, lease_s: float) -> AbstractContextManager[subprocess.Popen[bytes]]:
        locks = self._workspace.settings.data_dir / f"locks-{name}-{lease_s:g}"
        return self._workspace.worker(
            QLORA_SLOTS=str(JOBS), QLORA_LOCK_DIR=str(locks), QLORA_LEASE_S=str(lease_s), QLORA_MAX_DEATHS="10000"
        )

    def turn(self, *, train: bool = False, take_lease: bool = False) -> None:
        """The owner and its trainers become zombies, the heir becomes the owner."""
        service = self._workspace.service
        if train:
            self._until(lambda: all(service.jobs.get(job_id).phase == "training" for job_id in self._jobs))
        time.sleep(self._chance.uniform(*LIFE_S))
        zombies = self._stop_owner()
        self.zombies += len(zombies)
        self.phases.update(service.jobs.get(claim.job_id).phase or "between" for claim in zombies.values())
        if take_lease:
            self._write("UPDATE jobs SET lease_until = 0 WHERE status = 'running'", wait_s=10)
        self._until(lambda: self._inherited(zombies))
        self._awaken([*zombies, self._owner.pid])
        self._bury(zombies)
        self._owner, self._heir = self._heir, self._owner

    def _stop_owner(self) -> dict[int, Claim]:
        """The owner's trainers, which stand still as it does.

        Never while one of them holds SQLite's write lock: it would keep it, and everybody would wait for it.
        """
        while True:
            os.kill(self._owner.pid, signal.SIGSTOP)
            zombies = trainers_of(self._owner.pid)
            for pid in zombies:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            # The signal is on its way: a thread may take the lock yet.
            stopped = [self._owner.pid, *zombies]
            self._until(lambda pids=stopped: all(map(_stands_still, pids)))
            with suppress(sqlite3.OperationalError):
                self._write("BEGIN IMMEDIATE", wait_s=0.3)
                return zombies
            self._awaken([*zombies, self._owner.pid])
            time.sleep(0.05)

    def _awaken(self, pids: list[int]) -> None:
        self._chance.shuffle(pids)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _inherited(self, zombies: dict[int, Claim]) -> bool:
        """Whether a newer attempt at each of the zombies' jobs runs, under the heir."""
        claims = trainers_of(self._heir.pid).values()
        tokens = {claim.job_id: claim.token for claim in claims}
        return all(tokens.get(zombie.job_id, 0) > zombie.token for zombie in zombies.values())

    def _write(self, statement: str, wait_s: float) -> None:
        with (
            closing(sqlite3.connect(self._workspace.settings.data_dir / "state.db", timeout=wait_s)) as database,
            database,
        ):
            database.execute(statement)

    def _bury(self, zombies: dict[int, Claim]) -> None:
        awakened_at = time.monotonic()
        while set(trainers_of(self._owner.pid)) & set(zombies):
            lived_s = time.monotonic() - awakened_at
            self.gone_s = max(self.gone_s, lived_s)
            if lived_s > GONE_WITHIN_S:
                return
            time.sleep(0.05)

    def _until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not reached():
            assert time.monotonic() < deadline, [self._workspace.service.jobs.get(job_id) for job_id in self._jobs]
            time.sleep(0.05)


def _stands_still(pid: int) -> bool:
    """Whether every thread of a process is stopped, or the process is gone."""
    try:
        states = [
            (task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()
        ]
    except OSError:
        return True
    return set(states) <= {"T", "Z", "X"}
