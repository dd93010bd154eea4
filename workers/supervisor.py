"""The supervisor: claims jobs, spawns one trainer process per slot, sees each one's end. It never imports torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.exc import OperationalError

from qlora_service.errors import ClaimLost, JobFailed
from qlora_service.jobs import FailureReason, Job
from qlora_service.lifeline import kill_group
from qlora_service.queue import Claim, Queue
from qlora_service.store.database import Database, persist
from qlora_service.store.jobs import get_job

log = structlog.get_logger()

IDLE_POLL_S = 0.5
ERROR_PAUSE_S = 5.0
CHILD_POLL_S = 0.1
CANCEL_POLL_S = 2.0
STOP_GRACE_S = 8.0
"""A trainer that has not stopped so long after SIGTERM is killed; its job goes back to the queue."""


@dataclass(frozen=True)
class Slot:
    """Room for one trainer: a GPU by its UUID, or the CPU."""

    index: int
    gpu: str | None

    @property
    def device(self) -> str:
        """ "cuda" or "cpu": what a trainer in this slot has to run on."""
        return "cpu" if self.gpu is None else "cuda"

    def environment(self) -> dict[str, str]:
        return os.environ | ({"CUDA_VISIBLE_DEVICES": self.gpu} if self.gpu is not None else {})


class Supervisor:
    """Runs queued jobs until told to stop. One thread per slot; the trainers are processes."""

    def __init__(
        self,
        *,
        database: Database,
        queue: Queue,
        slots: list[Slot],
        tmp_dir: Path,
        log_dir: Path,
        cancel_grace_s: float,
        lease_s: float,
    ) -> None:
        self._database = database
        self._queue = queue
        self._slots = slots
        self._tmp_dir = tmp_dir
        self._log_dir = log_dir
        self._cancel_grace_s = cancel_grace_s
        self._lease_s = lease_s
        self._requeue_every_s = lease_s / 3
        self._stop = threading.Event()
        log_dir.mkdir(parents=True, exist_ok=True)

    def stop(self) -> None:
        """Stop claiming, let trainers give their jobs back, and return from `run`; safe in a signal handler."""
        self._stop.set()

    def run(self) -> None:
        """Work until `stop`; leaves no trainer behind."""
        self._reap_scratch()
        threads = [
            threading.Thread(
                target=self._forever, args=(lambda slot=slot: self._serve(slot),), name=f"slot-{slot.index}"
            )
            for slot in self._slots
        ]
        threads.append(threading.Thread(target=self._forever, args=(self._requeue_lost,), name="requeue"))
        for thread in threads:
            thread.start()
        log.info("supervisor_ready", slots=[slot.gpu or "cpu" for slot in self._slots])
        for thread in threads:
            thread.join()
        log.info("supervisor_stopped")

    def _forever(self, work: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                work()
            except OperationalError as error:
                log.warning("database_unavailable", error=str(error.orig))
                self._stop.wait(IDLE_POLL_S)
            except Exception:
                # A slot that ended here would leave a service that looks healthy and claims nothing.
                log.exception("supervisor_error", thread=threading.current_thread().name)
                self._stop.wait(ERROR_PAUSE_S)

    def _requeue_lost(self) -> None:
        for job_id in self._queue.requeue_lost():
            log.warning("job_requeued", job=job_id, reason="its lease expired")
        self._stop.wait(self._requeue_every_s)

    def _serve(self, slot: Slot) -> None:
        """Claim one job and see it through, or wait a moment."""
        claimed = self._queue.claim(f"{socket.gethostname()}:{os.getpid()}:{slot.index}")
        if claimed is None:
            self._stop.wait(IDLE_POLL_S)
            return
        claim, _ = claimed
        log.info("job_claimed", job=claim.job_id, token=claim.token, slot=slot.index)
        try:
            self._run_trainer(claim, slot)
        except OSError as error:
            # No room for the log, no process to be had: this attempt cannot be made here.
            failure = JobFailed(f"the trainer could not be started: {error}", reason=FailureReason.INTERNAL)
            persist(lambda: self._queue.fail(claim, failure.as_dict()), self._lease_s)
            raise
        finally:
            shutil.rmtree(self._tmp_dir / claim.name, ignore_errors=True)

    def _run_trainer(self, claim: Claim, slot: Slot) -> None:
        log_path = self._log_dir / f"{claim.name}.log"
        with log_path.open("wb") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", "workers.trainer", claim.job_id, str(claim.token), slot.device],
                stdin=subprocess.PIPE,  # never written to: its closing tells the trainer that we are gone
                stdout=output,
                stderr=subprocess.STDOUT,
                env=slot.environment(),
                start_new_session=True,
            )
        try:
            how = self._wait(child, claim)
        finally:
            kill_group(child)
            child.wait()
            assert child.stdin is not None
            child.stdin.close()
        if child.returncode != 0 or self._queue.is_running(claim):
            persist(lambda: self._record_end(claim, child.returncode, how, log_path), self._lease_s)

    def _wait(self, child: subprocess.Popen[bytes], claim: Claim) -> str:
        """Wait for the trainer's end; how it came about: "ended", "stopped" or "cancelled"."""
        cancel_deadline: float | None = None
        next_look = time.monotonic() + CANCEL_POLL_S
        while not self._stop.is_set():
            try:
                child.wait(CHILD_POLL_S)
                return "ended"
            except subprocess.TimeoutExpired:
                now = time.monotonic()
            if cancel_deadline is not None and now > cancel_deadline:
                return "cancelled"
            if cancel_deadline is None and now > next_look:
                next_look = now + CANCEL_POLL_S
                if self._cancel_requested(claim):
                    cancel_deadline = now + self._cancel_grace_s
        child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_GRACE_S)
        return "stopped"

    def _cancel_requested(self, claim: Claim) -> bool:
        try:
            return self._queue.cancel_requested(claim)
        except OperationalError as error:  # no reason to end a trainer; it is asked again
            log.warning("database_unavailable", error=str(error.orig))
            return False

    def _record_end(self, claim: Claim, returncode: int, how: str, log_path: Path) -> None:
        """Write the outcome that the trainer did not live to write; nothing when it did."""
        try:
            if how == "stopped":
                self._queue.release(claim, "the worker was stopped")
            elif how == "cancelled" or self._queue.cancel_requested(claim):
                self._queue.cancelled(claim)
            else:
                failure = trainer_death(self._job(claim), returncode, log_path.name)
                self._queue.fail(claim, failure.as_dict())
                log.error("trainer_died", job=claim.job_id, token=claim.token, log=str(log_path), **failure.details)
        except ClaimLost:
            # The trainer wrote its outcome and was stopped on its way out, or a newer claim owns the job.
            log.info("outcome_recorded_elsewhere", job=claim.job_id, token=claim.token)

    def _reap_scratch(self) -> None:
        """Remove what attempts left behind whose supervisor was killed."""
        for path in self._tmp_dir.glob("job_*-*"):
            job_id, _, token = path.name.rpartition("-")
            if token.isdigit() and not self._queue.is_running(Claim(job_id, int(token))):
                shutil.rmtree(path, ignore_errors=True)

    def _job(self, claim: Claim) -> Job:
        with self._database.read() as connection:
            return get_job(connection, claim.job_id)


def trainer_death(job: Job, returncode: int, log_name: str) -> JobFailed:
    """How a trainer died, as the job's failure: signal or exit code, and the last step it finished."""
    total = f" of {job.total_steps}" if job.total_steps else ""
    where = f"in phase {job.phase}" if job.step == 0 else f"after step {job.step}{total}"
    details: dict[str, Any] = {"reason": FailureReason.TRAINER_DIED, "last_step": job.step, "phase": job.phase}
    see = f"the worker's logs/{log_name} has what it printed"
    if returncode < 0:
        known = {entry.value: entry.name for entry in signal.Signals}
        name = known.get(-returncode, f"signal {-returncode}")
        hint = "; the kernel kills so when the host runs out of memory" if name == "SIGKILL" else ""
        return JobFailed(f"the trainer was killed by {name} {where}{hint}; {see}", **details, signal=name)
    return JobFailed(f"the trainer ended with exit code {returncode} {where}; {see}", **details, exit_code=returncode)
