"""The supervisor: claims jobs, has one trainer process per slot run them, sees each one's end. It never imports torch.

Between the jobs the same process answers chats (`inference_turns`).
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
from workers.supervisor.host_memory import oom_kills
from workers.supervisor.housekeeping import Housekeeping
from workers.supervisor.inference_turns import ChatRules, ChatTurns
from workers.supervisor.probe_turns import ProbeTurns
from workers.supervisor.slot_lock import SlotLock
from workers.supervisor.slot_process import SlotProcess

log = structlog.get_logger()

IDLE_POLL_S = 0.5
ERROR_PAUSE_S = 5.0
CHILD_POLL_S = 0.1
REQUEST_POLL_S = 2.0
STOP_GRACE_S = 7.0
"""A trainer that has not stopped so long after SIGTERM is killed; its job goes back to the queue. A worker is gone
within 8 s, and the second that is left is for the database."""

End = Literal["waits", "ended", "stopped", "overdue", "lost"]
"""Why nobody waits for an attempt any more: the trainer is done with it and waits for the next, or ended by itself; the
worker stops; it did not do what was asked of it in time, or its claim is another's."""


@dataclass(frozen=True)
class SupervisorSettings:
    """Directories and times; see the service's settings of the same names."""

    socket_dir: Path
    lock_dir: Path
    log_dir: Path
    cancel_grace_s: float
    lease_s: float
    warm_s: float
    """How long a base stays loaded for the next job; 0 for a new trainer each time"""


@dataclass(frozen=True)
class Slot:
    """Room for one trainer: a GPU by its UUID, or the CPU."""

    index: int
    gpu: str | None

    @property
    def name(self) -> str:
        """What its lock file is called."""
        return self.gpu or f"cpu-{self.index}"

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
        self._busy: set[str] = set()
        self._stop = threading.Event()
        settings.log_dir.mkdir(parents=True, exist_ok=True)

    def stop(self) -> None:
        """Stop claiming, let trainers give their jobs back, and return from `run`; safe in a signal handler."""
        self._stop.set()

    def run(self) -> None:
        """Work until `stop`; leaves no trainer behind."""
        threads = [
            threading.Thread(target=self._keep_slot, args=(slot,), name=f"slot-{slot.index}") for slot in self._slots
        ]
        threads.append(threading.Thread(target=self._forever, args=(self._look_after_queue,), name="queue"))
        for thread in threads:
            thread.start()
        log.info("supervisor_ready", slots=[slot.name for slot in self._slots])
        for thread in threads:
            # Never without a limit: a signal that came just before such a wait is handled when it ends.
            while thread.is_alive():
                thread.join(IDLE_POLL_S)
        log.info("supervisor_stopped")

    def _forever(self, work: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                work()
            except Exception as error:
                if is_outage(error):
                    log.warning("database_unavailable", error=str(error))
                    self._stop.wait(IDLE_POLL_S)
                    continue
                # A slot that ended here would leave a service that looks healthy and claims nothing.
                log.exception("supervisor_error", thread=threading.current_thread().name)
                self._stop.wait(ERROR_PAUSE_S)

    def _look_after_queue(self) -> None:
        busy = frozenset(self._busy)
        self._housekeeping.tick(preemptible=busy, slot_is_free=len(busy) < len(self._slots))
        self._stop.wait(IDLE_POLL_S)

    def _keep_slot(self, slot: Slot) -> None:
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
        self._forever(lambda: self._serve(slot, lock, chats, probes, trainer))
        trainer.release()
        lock.close()

    def _serve(self, slot: Slot, lock: SlotLock, chats: ChatTurns, probes: ProbeTurns, trainer: SlotProcess) -> None:
        """Claim one job and see it through, or have a base loaded to chat with, or a step timed, or wait a moment."""
        if not lock.acquire():
            # Another worker has the slot, or what is left of one.
            self._end_zombies(lock)
            self._stop.wait(IDLE_POLL_S)
            return
        worker = f"{socket.gethostname()}:{slot.name}:{lock.identity[:8]}"
        # Whoever had the slot before is gone, trainers included: what it ran need not wait for the lease's end.
        for job_id in self._queue.requeue_of(worker):
            log.warning("job_requeued", job=job_id, reason="its worker was killed")
        if (base := chats.first(worker)) is not None:
            chats.run(base, worker, trainer, self._stop)
            return
        claimed = self._queue.claim(worker, trainer.warm)
        if claimed is None:
            if (base := chats.wanted(worker)) is not None:
                chats.run(base, worker, trainer, self._stop)
            elif not probes.run_next(worker, lock.descriptor, self._stop, make_room=trainer.release):
                trainer.release_if_idle()
                self._stop.wait(IDLE_POLL_S)
            return
        claim, job = claimed
        log.info("job_claimed", job=claim.job_id, token=claim.token, slot=slot.name)
        self._busy.add(worker)
        try:
            self._run(claim, job, trainer, lambda: chats.consider(claim, worker))
        except OSError as error:
            # No room for the log, no process to be had.
            cause = {"message": f"the trainer could not be started: {error}", "reason": FailureReason.INTERNAL}
            persist(lambda: self._queue.died(claim, cause), self._settings.lease_s)
            raise
        finally:
            self._busy.discard(worker)
            self._housekeeping.after_attempt(claim)

    def _end_zombies(self, lock: SlotLock) -> None:
        """Kill processes in our slot whose supervisor is gone: one that stands still cannot end by itself."""
        for pid in lock.other_holders():
            parent = parent_of(pid)
            if is_ours(pid) and parent is not None and not lock.is_open_in(parent):
                log.warning("zombie_killed", pid=pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _run(self, claim: Claim, job: Job, trainer: SlotProcess, consider_chats: Callable[[], None]) -> None:
        """See the claim's attempt through; afterwards the trainer waits for the next one, or there is none."""
        oom_kills_before = oom_kills()
        trainer.begin(claim, job)
        how: End = "ended"
        code = 0
        try:
            how = self._wait(trainer, claim, consider_chats)
        finally:
            if how != "waits":
                code = trainer.end()
            self._housekeeping.make_room(claim)
        if code == 0 and not self._queue.is_running(claim):
            return
        trainer.end()
        host_oom = oom_kills() > oom_kills_before
        cause = death(code, how, f"{claim.name}.log", host_oom=host_oom)
        persist(lambda: self._record_end(claim, how, cause), self._settings.lease_s)

    def _wait(self, trainer: SlotProcess, claim: Claim, consider_chats: Callable[[], None]) -> End:
        """Wait for the attempt's end, or for a reason to end it."""
        deadline: float | None = None
        how: End = "ended"
        next_look = time.monotonic() + REQUEST_POLL_S
        while not self._stop.is_set():
            state = trainer.wait(CHILD_POLL_S)
            if state != "works":
                return state
            now = time.monotonic()
            if deadline is not None and now > deadline:
                log.warning("trainer_overdue", job=claim.job_id, token=claim.token, why=how)
                dump_stacks(trainer)
                return how
            if deadline is None and now > next_look:
                next_look = now + REQUEST_POLL_S
                try:
                    if self._queue.stop_request(claim) is not None:
                        how, deadline = "overdue", now + self._settings.cancel_grace_s
                    else:
                        consider_chats()
                except ClaimLost:  # its outcome is written and it is about to end, or the claim is another's
                    how, deadline = "lost", now + STOP_GRACE_S
                except SQLAlchemyError as error:  # no reason to end a trainer; it is asked again
                    log.warning("database_unavailable", error=str(error))
        trainer.send_signal(signal.SIGTERM)
        trainer.wait_for_end(STOP_GRACE_S)
        return "stopped"

    def _record_end(self, claim: Claim, how: End, cause: dict[str, Any]) -> None:
        """Write the outcome that the trainer did not live to write; nothing when it did."""
        try:
            if how == "stopped":
                self._queue.release(claim, "the worker was stopped")
            elif self._queue.stop_request(claim) is StopRequest.CANCEL:
                self._queue.cancelled(claim)
            else:
                status = self._queue.died(claim, cause)
                log.error("trainer_died", job=claim.job_id, token=claim.token, status=status, **cause)
        except ClaimLost:
            # The trainer wrote its outcome and was stopped on its way out, or a newer claim owns the job.
            log.info("outcome_recorded_elsewhere", job=claim.job_id, token=claim.token)


def dump_stacks(trainer: SlotProcess) -> None:
    """Have the trainer write where its threads are into its log, before it is killed."""
    trainer.send_signal(signal.SIGUSR1)
    trainer.wait_for_end(CHILD_POLL_S)


def is_ours(pid: int) -> bool:
    """Whether the process is a trainer or a probe, by its command line."""
    return not {"workers.trainer", "workers.probe"}.isdisjoint(_arguments(pid))


def parent_of(pid: int) -> int | None:
    """The process that started `pid`, or that took it over; None when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def death(returncode: int, how: End, log_name: str, *, host_oom: bool) -> dict[str, Any]:
    """How an attempt ended without an outcome: `message`, `reason`, and the signal or exit code."""
    see = f"the worker's logs/{log_name} has what it printed"
    cause: dict[str, Any] = {"reason": FailureReason.TRAINER_DIED}
    if how == "overdue":
        message = "the trainer did not stop when it was asked to, and was killed; the log has where it stood"
    elif returncode < 0:
        known = {entry.value: entry.name for entry in signal.Signals}
        cause["signal"] = known.get(-returncode, f"signal {-returncode}")
        message = f"the trainer was killed by {cause['signal']}"
        if cause["signal"] == "SIGKILL" and host_oom:
            cause["reason"] = FailureReason.HOST_OUT_OF_MEMORY
            message = "the kernel killed the trainer, because the host's memory (or the container's limit) ran out"
    else:
        cause["exit_code"] = returncode
        message = CAUSES.get(returncode, f"the trainer ended with exit code {returncode}")
    return {"message": f"{message}; {see}", **cause}
