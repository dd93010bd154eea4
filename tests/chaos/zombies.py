"""Zombies: a supervisor and trainers that are stopped past their lease and continue after another worker has claimed
their jobs. No write of a zombie may be accepted, and all must exit soon.

Two workers take the jobs from each other in turn: the one that has them is stopped at a random moment, and continued
when the other has claimed them all. Each has its own lock directory, so that neither ends the other's trainers.
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
"""Lifetime of trainers before they are stopped: in most rounds they have a claim, and have not imported torch yet"""
GONE_WITHIN_S = 10.0
"""Longest allowed lifetime of a zombie after SIGCONT"""


@dataclass(frozen=True)
class Zombies:
    """Outcome of the zombies."""

    zombies: int
    """Trainers that were stopped until their lease expired"""
    unaware: int
    """Stopped trainers whose lease was expired in the database, while by their own clock it still holds"""
    writes_accepted: list[str]
    phases: dict[str, int]
    """Number of stops by the job's phase"""
    gone_s: float
    """Longest lifetime after SIGCONT"""
    seconds: float


def run(workspace: Workspace, times: int, *, seed: int = 0) -> Zombies:
    """Makes at least `times` zombies with an expired lease, and about a quarter as many unaware ones."""
    started, generator = time.monotonic(), random.Random(seed)
    jobs = [workspace.submit(max_steps=100_000) for _ in range(JOBS)]
    rounds = _Rounds(workspace, jobs, generator)
    with rounds.workers(LEASE_S):
        while rounds.zombies < times:
            # One round in four waits for the training phase.
            rounds.run(train=rounds.zombies % 20 >= 20 - JOBS)
    zombies = rounds.zombies
    with rounds.workers(UNAWARE_LEASE_S):
        while rounds.zombies < times + times // 4:
            rounds.run(expire_lease=True)
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
    """Events of a job that an attempt before the current one, or its supervisor, has written."""
    writes, current = list[str](), 0
    for event in workspace.service.jobs.events(job_id):
        if event.data.get("status") == JobStatus.RUNNING:
            current = event.data["attempt"]
        elif _writer(job_id, event, current) != current:
            writes.append(f"{job_id}, event {event.seq} while attempt {current} ran: {event.data}")
    return writes


def _writer(job_id: str, event: JobEvent, current: int) -> int:
    """The attempt that wrote an event, from its number, or from the attempt's log file that a supervisor names."""
    if "attempt" in event.data:
        return int(event.data["attempt"])
    _, log, rest = str(event.data.get("reason", "")).partition(f"{job_id}-")
    return int(rest.partition(".")[0]) if log else current


class _Rounds:
    """Rounds in which the jobs change from one worker to the other."""

    def __init__(self, workspace: Workspace, jobs: list[str], generator: random.Random) -> None:
        self._workspace, self._jobs, self._generator = workspace, jobs, generator
        self._owner: subprocess.Popen[bytes]
        self._standby: subprocess.Popen[bytes]
        self.zombies = 0
        self.gone_s = 0.0
        self.phases: Counter[str] = Counter()

    @contextmanager
    def workers(self, lease_s: float) -> Iterator[None]:
        """Two workers: the owner of the jobs, and a standby with as many slots."""
        with ExitStack() as stack:
            self._owner = stack.enter_context(self._worker("owner", lease_s))
            self._until(lambda: len(trainers_of(self._owner.pid)) == JOBS)
            self._standby = stack.enter_context(self._worker("standby", lease_s))
            try:
                yield
            finally:
                self._continue([self._owner.pid, self._standby.pid])

    def _worker(self, name: str, lease_s: float) -> AbstractContextManager[subprocess.Popen[bytes]]:
        locks = self._workspace.settings.data_dir / f"locks-{name}-{lease_s:g}"
        return self._workspace.worker(
            QLORA_SLOTS=str(JOBS), QLORA_LOCK_DIR=str(locks), QLORA_LEASE_S=str(lease_s), QLORA_MAX_DEATHS="10000"
        )

    def run(self, *, train: bool = False, expire_lease: bool = False) -> None:
        """Makes zombies of the owner and its trainers; the standby becomes the owner."""
        service = self._workspace.service
        if train:
            self._until(lambda: all(service.jobs.get(job_id).phase == "training" for job_id in self._jobs))
        time.sleep(self._generator.uniform(*LIFE_S))
        zombies = self._stop_owner()
        self.zombies += len(zombies)
        self.phases.update(service.jobs.get(claim.job_id).phase or "between" for claim in zombies.values())
        if expire_lease:
            self._write("UPDATE jobs SET lease_until = 0 WHERE status = 'running'", wait_s=10)
        self._until(lambda: self._standby_has_claimed(zombies))
        self._continue([*zombies, self._owner.pid])
        self._wait_for_exit(zombies)
        self._owner, self._standby = self._standby, self._owner

    def _stop_owner(self) -> dict[int, Claim]:
        """Stops the owner and its trainers; the trainers' claims by pid.

        Not while one of them holds SQLite's write lock, for which all other processes would wait.
        """
        while True:
            os.kill(self._owner.pid, signal.SIGSTOP)
            zombies = trainers_of(self._owner.pid)
            for pid in zombies:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            # Until the signal has reached every thread, one may still take the lock.
            stopped = [self._owner.pid, *zombies]
            self._until(lambda pids=stopped: all(map(_is_stopped, pids)))
            with suppress(sqlite3.OperationalError):
                self._write("BEGIN IMMEDIATE", wait_s=0.3)
                return zombies
            self._continue([*zombies, self._owner.pid])
            time.sleep(0.05)

    def _continue(self, pids: list[int]) -> None:
        """Sends SIGCONT in random order."""
        self._generator.shuffle(pids)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _standby_has_claimed(self, zombies: dict[int, Claim]) -> bool:
        """Whether the standby runs a newer attempt of each zombie's job."""
        claims = trainers_of(self._standby.pid).values()
        tokens = {claim.job_id: claim.token for claim in claims}
        return all(tokens.get(zombie.job_id, 0) > zombie.token for zombie in zombies.values())

    def _write(self, statement: str, wait_s: float) -> None:
        """Executes a statement, and waits at most `wait_s` for SQLite's write lock."""
        with (
            closing(sqlite3.connect(self._workspace.settings.data_dir / "state.db", timeout=wait_s)) as database,
            database,
        ):
            database.execute(statement)

    def _wait_for_exit(self, zombies: dict[int, Claim]) -> None:
        """Measures the time until all zombies have exited; returns after GONE_WITHIN_S at the latest."""
        continued_at = time.monotonic()
        while set(trainers_of(self._owner.pid)) & set(zombies):
            elapsed_s = time.monotonic() - continued_at
            self.gone_s = max(self.gone_s, elapsed_s)
            if elapsed_s > GONE_WITHIN_S:
                return
            time.sleep(0.05)

    def _until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not reached():
            assert time.monotonic() < deadline, [self._workspace.service.jobs.get(job_id) for job_id in self._jobs]
            time.sleep(0.05)


def _is_stopped(pid: int) -> bool:
    """Whether every thread of a process is stopped, or the process is gone."""
    try:
        states = [
            (task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()
        ]
    except OSError:
        return True
    return set(states) <= {"T", "Z", "X"}
