"""The supervisor: claims jobs, spawns one trainer process per slot, sees each one's end. It never imports torch.

Between the jobs a slot has room for a process that answers chats (`inference_turns`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import structlog
from sqlalchemy.exc import SQLAlchemyError

from qlora_service.errors import ClaimLost
from qlora_service.jobs import FailureReason, StopRequest
from qlora_service.lifeline import kill_group
from qlora_service.queue import Claim, Queue
from qlora_service.store.database import Database, is_outage, persist
from workers.exit_codes import CAUSES
from workers.host_memory import oom_kills
from workers.housekeeping import Housekeeping
from workers.inference_turns import ChatRules, ChatTurns
from workers.slot_lock import SlotLock

log = structlog.get_logger()

IDLE_POLL_S = 0.5
ERROR_PAUSE_S = 5.0
CHILD_POLL_S = 0.1
REQUEST_POLL_S = 2.0
STOP_GRACE_S = 7.0
"""A trainer that has not stopped so long after SIGTERM is killed; its job goes back to the queue. A worker is gone
within 8 s, and the second that is left is for the database."""

End = Literal["ended", "stopped", "overdue", "lost"]
"""Why nobody waits for a trainer any more: it ended by itself, the worker stops, it did not do what was asked of it in
time, or its claim is another's."""


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
        socket_dir: Path,
        lock_dir: Path,
        log_dir: Path,
        cancel_grace_s: float,
        lease_s: float,
    ) -> None:
        self._database = database
        self._queue = queue
        self._slots = slots
        self._housekeeping = housekeeping
        self._chat_rules = chat_rules
        self._socket_dir = socket_dir
        self._lock_dir = lock_dir
        self._log_dir = log_dir
        self._cancel_grace_s = cancel_grace_s
        self._lease_s = lease_s
        self._busy: set[str] = set()
        self._stop = threading.Event()
        log_dir.mkdir(parents=True, exist_ok=True)

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
        all_busy = len(self._busy) == len(self._slots)
        self._housekeeping.tick(preemptible=frozenset(self._busy) if all_busy else frozenset())
        self._stop.wait(IDLE_POLL_S)

    def _keep_slot(self, slot: Slot) -> None:
        lock = SlotLock(self._lock_dir, slot.name)
        chats = ChatTurns(
            self._database,
            self._chat_rules,
            slot=slot.name,
            device=slot.device,
            environment=slot.environment(),
            socket_dir=self._socket_dir,
            log_dir=self._log_dir,
        )
        self._forever(lambda: self._serve(slot, lock, chats))
        lock.close()

    def _serve(self, slot: Slot, lock: SlotLock, chats: ChatTurns) -> None:
        """Claim one job and see it through, or have a base loaded to chat with, or wait a moment."""
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
            chats.run(base, worker, lock.descriptor, self._stop)
            return
        claimed = self._queue.claim(worker)
        if claimed is None:
            if (base := chats.wanted(worker)) is not None:
                chats.run(base, worker, lock.descriptor, self._stop)
            else:
                self._stop.wait(IDLE_POLL_S)
            return
        claim, _ = claimed
        log.info("job_claimed", job=claim.job_id, token=claim.token, slot=slot.name)
        self._busy.add(worker)
        try:
            self._run_trainer(claim, slot, lock, lambda: chats.consider(claim, worker))
        except OSError as error:
            # No room for the log, no process to be had.
            cause = {"message": f"the trainer could not be started: {error}", "reason": FailureReason.INTERNAL}
            persist(lambda: self._queue.died(claim, cause), self._lease_s)
            raise
        finally:
            self._busy.discard(worker)
            self._housekeeping.after_attempt(claim)

    def _end_zombies(self, lock: SlotLock) -> None:
        """Kill processes in our slot that nobody owns any more: one that stands still cannot end by itself.

        That is a trainer without its claim, and an inference process without its supervisor.
        """
        holders = lock.other_holders()
        for pid in holders:
            claim = claim_of_trainer(pid)
            is_lost = claim is not None and not self._queue.is_running(claim)
            if is_lost or (is_inference(pid) and parent_of(pid) not in holders):
                log.warning("zombie_killed", claim=None if claim is None else claim.name, pid=pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _run_trainer(self, claim: Claim, slot: Slot, lock: SlotLock, consider_chats: Callable[[], None]) -> None:
        log_path = self._log_dir / f"{claim.name}.log"
        oom_kills_before = oom_kills()
        with log_path.open("wb") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", "workers.trainer", claim.job_id, str(claim.token), slot.device],
                stdin=subprocess.PIPE,  # never written to: its closing tells the trainer that we are gone
                stdout=output,
                stderr=subprocess.STDOUT,
                env=slot.environment(),
                pass_fds=[lock.descriptor],
                start_new_session=True,
            )
        try:
            how = self._wait(child, claim, consider_chats)
        finally:
            kill_group(child)
            child.wait()
            assert child.stdin is not None
            child.stdin.close()
            self._housekeeping.make_room(claim)
        if child.returncode != 0 or self._queue.is_running(claim):
            host_oom = oom_kills() > oom_kills_before
            cause = death(child.returncode, how, log_path.name, host_oom=host_oom)
            persist(lambda: self._record_end(claim, how, cause), self._lease_s)

    def _wait(self, child: subprocess.Popen[bytes], claim: Claim, consider_chats: Callable[[], None]) -> End:
        """Wait for the trainer's end, or for a reason to end it."""
        deadline: float | None = None
        how: End = "ended"
        next_look = time.monotonic() + REQUEST_POLL_S
        while not self._stop.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(CHILD_POLL_S)
                return "ended"
            now = time.monotonic()
            if deadline is not None and now > deadline:
                log.warning("trainer_overdue", job=claim.job_id, token=claim.token, why=how)
                dump_stacks(child)
                return how
            if deadline is None and now > next_look:
                next_look = now + REQUEST_POLL_S
                try:
                    if self._queue.stop_request(claim) is not None:
                        how, deadline = "overdue", now + self._cancel_grace_s
                    else:
                        consider_chats()
                except ClaimLost:  # its outcome is written and it is about to end, or the claim is another's
                    how, deadline = "lost", now + STOP_GRACE_S
                except SQLAlchemyError as error:  # no reason to end a trainer; it is asked again
                    log.warning("database_unavailable", error=str(error))
        child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_GRACE_S)
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


def dump_stacks(trainer: subprocess.Popen[bytes]) -> None:
    """Have the trainer write where its threads are into its log, before it is killed."""
    trainer.send_signal(signal.SIGUSR1)
    with contextlib.suppress(subprocess.TimeoutExpired):
        trainer.wait(CHILD_POLL_S)


def claim_of_trainer(pid: int) -> Claim | None:
    """The claim of a trainer process, by its command line; None of any other process."""
    arguments = _arguments(pid)
    if "workers.trainer" not in arguments[:-2]:
        return None
    job_id, token = arguments[arguments.index("workers.trainer") + 1 :][:2]
    return Claim(job_id, int(token)) if token.isdigit() else None


def is_inference(pid: int) -> bool:
    """Whether the process is one that answers chats, by its command line."""
    return "workers.inference" in _arguments(pid)


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
