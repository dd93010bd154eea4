"""Jobs under real workers: one that never ends, the step of a resume, and a stopped trainer."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

from tests.workspace import Workspace, trainer_pids

ENDLESS = {"max_steps": 100_000}


def resumed_from(workspace: Workspace, job_id: str) -> int:
    """The step after which the job's second attempt resumed."""
    events = workspace.service.jobs.events(job_id)
    return next(int(event.data["resumed_from_step"]) for event in events if "resumed_from_step" in event.data)


@contextmanager
def stopped_trainer(workspace: Workspace, job_id: str) -> Iterator[int]:
    """The pid of the job's trainer, stopped by SIGSTOP while it does not hold SQLite's write lock."""
    (pid,) = trainer_pids(job_id)
    database = workspace.settings.data_dir / "state.db"
    while True:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.05)
        other = sqlite3.connect(database, timeout=0.3, isolation_level=None)
        with closing(other), suppress(sqlite3.OperationalError):
            other.execute("BEGIN IMMEDIATE")
            break
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.02)
    try:
        yield pid
    finally:
        if pid in trainer_pids(job_id):
            os.kill(pid, signal.SIGKILL)
