"""The supervisor: claims jobs, runs each in its slot's trainer process, and records how the attempt ended.

Between jobs the same process answers chats (`chat_turns`). The supervisor never imports torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import structlog
from sqlalchemy.exc import SQLAlchemyError

from qlora_service.domain.jobs import FailureReason, Job, StopRequest
from qlora_service.errors import ClaimLost
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.queue.claim import Claim
from qlora_service.queue.queue import Queue
from qlora_service.store.database import Database, is_outage, persist
from workers.exit_codes import CAUSES
from workers.supervisor.chat_turns import ChatRules, ChatTurns
from workers.supervisor.host_memory import oom_kills
from workers.supervisor.housekeeping import Housekeeping
from workers.supervisor.probe_turns import ProbeTurns
from workers.supervisor.slot_lock import SlotLock
from workers.supervisor.slot_process import SlotProcess

log = structlog.get_logger()

IDLE_POLL_S = 0.5
ERROR_PAUSE_S = 5.0
CHILD_POLL_S = 0.1
REQUEST_POLL_S = 2.0
STOP_GRACE_S = 7.0
"""Seconds between SIGTERM and SIGKILL for a trainer; the job of a killed one goes back to the queue. A worker stops
within 8 s: the last second is for the database."""

WaitResult = Literal["idle", "ended", "stopped", "overdue", "lost"]
"""Why the supervisor stopped waiting for an attempt: the trainer finished it and is idle; the trainer exited; the
worker is being stopped; the trainer did not obey a request in time; the claim was lost."""


@dataclass(frozen=True)
class SupervisorSettings:
    """Directories and times; see the service's settings of the same names."""

    socket_dir: Path
    lock_dir: Path
    log_dir: Path
    cancel_grace_s: float
    lease_s: float
    warm_s: float
    """Seconds that a base stays loaded for the next job; 0: a new trainer for each job"""


@dataclass(frozen=True)
class Slot:
    """Room for one trainer: a GPU by its UUID, or the CPU."""

    index: int
    gpu: str | None

    @property
    def name(self) -> str:
        """The name of its lock file, without suffix."""
        return self.gpu or f"cpu-{self.index}"

    @property
    def device(self) -> str:
        """Device of the slot's trainer: "cuda" or "cpu"."""
        return "cpu" if self.gpu is None else "cuda"

    def environment(self) -> dict[str, str]:
        return os.environ | ({"CUDA_VISIBLE_DEVICES": self.gpu} if self.gpu is not None else {})


class Supervisor:
    """Runs queued jobs until stopped: one thread and one trainer process per slot."""

    def __init__(
        self,
        *,
        database: Database,
        queue: Queue,
        slots: list[Slot],
        housekeeping: Housekeeping,
        chat_rules: ChatRules,
        catalog: Catalog,
        settings: SupervisorSettings,
    ) -> None:
        self._database = database
        self._queue = queue
        self._slots = slots
        self._housekeeping = housekeeping
        self._chat_rules = chat_rules
        self._catalog = catalog
        self._settings = settings
        self._busy_workers: set[str] = set()
        self._stop = threading.Event()
        settings.log_dir.mkdir(parents=True, exist_ok=True)

    def stop(self) -> None:
        """Makes `run` stop claiming, release running jobs, and return; safe in a signal handler."""
        self._stop.set()

    def run(self) -> None:
        """Works until `stop`; leaves no trainer behind."""
        threads = [
            threading.Thread(target=self._run_slot, args=(slot,), name=f"slot-{slot.index}") for slot in self._slots
        ]
        threads.append(threading.Thread(target=self._repeat_until_stop, args=(self._maintain_queue,), name="queue"))
        for thread in threads:
            thread.start()
        log.info("supervisor_ready", slots=[slot.name for slot in self._slots])
        for thread in threads:
            # With a timeout: a signal that arrives just before the join is handled only when the join returns.
            while thread.is_alive():
                thread.join(IDLE_POLL_S)
        log.info("supervisor_stopped")

    def _repeat_until_stop(self, work: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                work()
            except Exception as error:
                if is_outage(error):
                    log.warning("database_unavailable", error=str(error))
                    self._stop.wait(IDLE_POLL_S)
                    continue
                # If the thread ended here, the service would look healthy and claim nothing.
                log.exception("supervisor_error", thread=threading.current_thread().name)
                self._stop.wait(ERROR_PAUSE_S)

    def _maintain_queue(self) -> None:
        busy = frozenset(self._busy_workers)
        self._housekeeping.tick(preemptible=busy, slot_is_free=len(busy) < len(self._slots))
        self._stop.wait(IDLE_POLL_S)

    def _run_slot(self, slot: Slot) -> None:
        lock = SlotLock(self._settings.lock_dir, slot.name)
        chats = ChatTurns(
            self._database,
            self._chat_rules,
            slot=slot.name,
            catalog=self._catalog,
            socket_dir=self._settings.socket_dir,
        )
        trainer = SlotProcess(
            slot=slot.name,
            device=slot.device,
            environment=slot.environment(),
            lock=lock.descriptor,
            log_dir=self._settings.log_dir,
            warm_s=self._settings.warm_s,
        )
        probes = ProbeTurns(
            self._database,
            slot=slot.name,
            device=slot.device,
            environment=slot.environment(),
            log_dir=self._settings.log_dir,
            max_running=self._chat_rules.max_running,
        )
        self._repeat_until_stop(lambda: self._serve_slot(slot, lock, chats, probes, trainer))
        trainer.release()
        lock.close()

    def _serve_slot(
        self, slot: Slot, lock: SlotLock, chats: ChatTurns, probes: ProbeTurns, trainer: SlotProcess
    ) -> None:
        """Runs one job, chats on one base, or one probe; pauses briefly if there is nothing to run."""
        if not lock.acquire():
            # Another worker holds the slot, or a trainer that outlived its worker.
            self._kill_zombies(lock)
            self._stop.wait(IDLE_POLL_S)
            return
        worker = f"{socket.gethostname()}:{slot.name}:{lock.identity[:8]}"
        # The lock is free, so the slot's earlier worker and trainers have ended: requeue before their lease expires.
        for job_id in self._queue.requeue_of(worker):
            log.warning("job_requeued", job=job_id, reason="its worker was killed")
        if (base := chats.base_after_preemption(worker)) is not None:
            chats.run(base, worker, trainer, self._stop)
            return
        claimed = self._queue.claim(worker, trainer.warm)
        if claimed is None:
            if (base := chats.requested_base(worker)) is not None:
                chats.run(base, worker, trainer, self._stop)
            elif not probes.run_next(worker, lock.descriptor, self._stop, empty_slot=trainer.release):
                trainer.release_if_idle()
                self._stop.wait(IDLE_POLL_S)
            return
        claim, job = claimed
        log.info("job_claimed", job=claim.job_id, token=claim.token, slot=slot.name)
        self._busy_workers.add(worker)
        try:
            self._run_attempt(claim, job, trainer, lambda: chats.consider_preemption(claim, worker))
        except OSError as error:
            # The log could not be written, or no process could be started.
            cause = {"message": f"the trainer could not be started: {error}", "reason": FailureReason.INTERNAL}
            persist(lambda: self._queue.died(claim, cause), self._settings.lease_s)
            raise
        finally:
            self._busy_workers.discard(worker)
            self._housekeeping.after_attempt(claim)

    def _kill_zombies(self, lock: SlotLock) -> None:
        """Kills processes in this slot that outlived their supervisor: a stopped process cannot exit by itself."""
        for pid in lock.other_holders():
            parent = parent_pid(pid)
            if is_worker_child(pid) and parent is not None and not lock.is_open_in(parent):
                log.warning("zombie_killed", pid=pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _run_attempt(
        self, claim: Claim, job: Job, trainer: SlotProcess, consider_preemption: Callable[[], None]
    ) -> None:
        """Runs the claim's attempt to its end; afterwards the trainer is idle, or has ended."""
        oom_kills_before = oom_kills()
        trainer.begin(claim, job)
        end: WaitResult = "ended"
        code = 0
        try:
            end = self._wait_for_attempt(trainer, claim, consider_preemption)
        finally:
            if end != "idle":
                code = trainer.end()
            self._housekeeping.release_reserve(claim)
        if code == 0 and not self._queue.is_running(claim):
            return
        trainer.end()
        host_oom = oom_kills() > oom_kills_before
        cause = death_cause(code, end, f"{claim.name}.log", host_oom=host_oom)
        persist(lambda: self._record_end(claim, end, cause), self._settings.lease_s)

    def _wait_for_attempt(
        self, trainer: SlotProcess, claim: Claim, consider_preemption: Callable[[], None]
    ) -> WaitResult:
        """Waits for the attempt's end, or for a reason to end it."""
        deadline: float | None = None
        end: WaitResult = "ended"
        next_request_at = time.monotonic() + REQUEST_POLL_S
        while not self._stop.is_set():
            state = trainer.wait(CHILD_POLL_S)
            if state != "busy":
                return state
            now = time.monotonic()
            if deadline is not None and now > deadline:
                log.warning("trainer_overdue", job=claim.job_id, token=claim.token, why=end)
                dump_stacks(trainer)
                return end
            if deadline is None and now > next_request_at:
                next_request_at = now + REQUEST_POLL_S
                try:
                    if self._queue.stop_request(claim) is not None:
                        end, deadline = "overdue", now + self._settings.cancel_grace_s
                    else:
                        consider_preemption()
                except ClaimLost:  # the outcome is written and the attempt about to end, or a newer claim owns the job
                    end, deadline = "lost", now + STOP_GRACE_S
                except SQLAlchemyError as error:  # no reason to end a trainer: the next poll asks again
                    log.warning("database_unavailable", error=str(error))
        trainer.send_signal(signal.SIGTERM)
        trainer.wait_for_end(STOP_GRACE_S)
        return "stopped"

    def _record_end(self, claim: Claim, end: WaitResult, cause: dict[str, Any]) -> None:
        """Writes the outcome of an attempt whose trainer ended without writing one."""
        try:
            if end == "stopped":
                self._queue.release(claim, "the worker was stopped")
            elif self._queue.stop_request(claim) is StopRequest.CANCEL:
                self._queue.cancelled(claim)
            else:
                status = self._queue.died(claim, cause)
                log.error("trainer_died", job=claim.job_id, token=claim.token, status=status, **cause)
        except ClaimLost:
            # The trainer wrote its outcome and was killed while exiting, or a newer claim owns the job.
            log.info("outcome_recorded_elsewhere", job=claim.job_id, token=claim.token)


def dump_stacks(trainer: SlotProcess) -> None:
    """Makes the trainer print the stacks of its threads into its log, before it is killed."""
    trainer.send_signal(signal.SIGUSR1)
    trainer.wait_for_end(CHILD_POLL_S)


def is_worker_child(pid: int) -> bool:
    """Whether the process is a trainer or a probe, by its command line."""
    return not {"workers.trainer", "workers.probe"}.isdisjoint(_command_line(pid))


def parent_pid(pid: int) -> int | None:
    """The pid of the current parent of `pid`; None when the process has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def death_cause(returncode: int, end: WaitResult, log_name: str, *, host_oom: bool) -> dict[str, Any]:
    """Why an attempt ended without an outcome: `message`, `reason`, and `signal` or `exit_code`."""
    log_hint = f"the worker's logs/{log_name} has its output"
    cause: dict[str, Any] = {"reason": FailureReason.TRAINER_DIED}
    if end == "overdue":
        message = "the trainer did not stop on request and was killed; the log has its stack traces"
    elif returncode < 0:
        names = {number.value: number.name for number in signal.Signals}
        cause["signal"] = names.get(-returncode, f"signal {-returncode}")
        message = f"the trainer was killed by {cause['signal']}"
        if cause["signal"] == "SIGKILL" and host_oom:
            cause["reason"] = FailureReason.HOST_OUT_OF_MEMORY
            message = "the kernel killed the trainer, because the host's memory (or the container's limit) ran out"
    else:
        cause["exit_code"] = returncode
        message = CAUSES.get(returncode, f"the trainer ended with exit code {returncode}")
    return {"message": f"{message}; {log_hint}", **cause}


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
