"""Chats on a slot between jobs: when a base is loaded for them, and how long they keep the slot. No torch."""

from __future__ import annotations

import secrets
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog

from qlora_service.chat.wire import Status, listen, query_status
from qlora_service.domain.clock import utc_now
from qlora_service.errors import QLoRAError
from qlora_service.models.base.needed_base import NeededBase
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.queue.claim import Claim
from qlora_service.specs import Quantization
from qlora_service.store import inference
from qlora_service.store.database import Database, is_outage, persist
from qlora_service.store.inference import LoadedBase
from workers.supervisor.slot_process import SlotProcess

POLL_S = 0.25
CONTENTION_DELAY_S = 1.0
"""A job or base that has waited for this long will not be taken by another slot."""
UNRESPONSIVE_S = 60.0
"""A process that has not answered a status request for this long hangs."""
LOADING_FACTOR = 6
"""Loading the base may take this many times longer than a token."""
DRAIN_SHARE = 0.5
"""Share of `hold_s` after which no further chat is begun, so that the current one can finish."""
STATUS_TIMEOUT_S = 1.0
STOP_GRACE_S = 2.0
DATABASE_PATIENCE_S = 30.0

log = structlog.get_logger()
Verdict = Literal["stay", "yield", "kill"]


@dataclass(frozen=True)
class ChatRules:
    """The operator's limits for chats; see the settings of the same names."""

    idle_s: float
    hold_s: float
    preempts: bool
    hang_s: float
    max_running: int | None


class ChatSlotPolicy:
    """Decides whether a process that answers chats stays on its slot. Pure: the caller passes the time."""

    def __init__(self, rules: ChatRules, now: float) -> None:
        self._rules = rules
        self._answered_at = now
        self._loaded_at: float | None = None
        self._contended_since: float | None = None
        self.job_waiting_since: float | None = None
        """Time since which a job has been waiting for the slot; None if no job waits"""

    def decide(self, now: float, status: Status | None, *, job_waits: bool, other_waits: bool) -> Verdict:
        """The verdict at time `now`, on a `status` that is None if the process does not answer.

        `other_waits`: a client waits for a base that no process has loaded.
        """
        rules = self._rules
        self._contended_since = (self._contended_since or now) if job_waits or other_waits else None
        self.job_waiting_since = (self.job_waiting_since or now) if job_waits else None
        if status is None:
            return "kill" if now - self._answered_at > min(UNRESPONSIVE_S, rules.hang_s) else "stay"
        self._answered_at = now
        if not status.loading:
            self._loaded_at = self._loaded_at or now
        is_working = status.loading or status.busy
        if is_working and status.quiet_s > rules.hang_s * (LOADING_FACTOR if status.loading else 1):
            return "kill"
        contended_s = 0.0 if self._contended_since is None else now - self._contended_since
        if contended_s < CONTENTION_DELAY_S:
            return "yield" if _is_idle(status) and status.quiet_s >= rules.idle_s else "stay"
        if job_waits and not rules.preempts:
            return "kill" if contended_s > rules.hold_s else "yield"
        # The process may have the slot because clients wait: they are served first, however long loading takes.
        held_s = 0.0 if self._loaded_at is None else min(contended_s, now - self._loaded_at)
        return "kill" if held_s > rules.hold_s else self._serve_waiting_clients(status, held_s)

    def _serve_waiting_clients(self, status: Status, held_s: float) -> Verdict:
        is_served = _is_idle(status) and (status.served > 0 or held_s > CONTENTION_DELAY_S)
        return "yield" if is_served or held_s > DRAIN_SHARE * self._rules.hold_s else "stay"


class ChatTurns:
    """Chats on one slot. Used by the slot's thread only."""

    def __init__(
        self,
        database: Database,
        rules: ChatRules,
        *,
        slot: str,
        catalog: Catalog,
        socket_dir: Path,
    ) -> None:
        self._database = database
        self._rules = rules
        self._slot, self._catalog, self._socket_dir = slot, catalog, socket_dir
        self._preempted_job = False
        # Seconds that chats held the slot against a waiting job: the next job trains for as long before a preemption.
        self._chat_held_s = 0.0
        self._claim: Claim | None = None
        self._first_step = 0
        self._training_since: float | None = None

    def base_after_preemption(self, worker: str) -> LoadedBase | None:
        """The base to load now, ahead of every job, because a job was preempted for it; None if none was."""
        preempted_job, self._preempted_job = self._preempted_job, False
        return self.requested_base(worker) if preempted_job else None

    def requested_base(self, worker: str) -> LoadedBase | None:
        """The base to load if no job waits."""
        with self._database.read() as connection:
            return inference.requested_base(connection, worker)

    def consider_preemption(self, claim: Claim, worker: str) -> None:
        """Preempts the slot's job if a client waits to chat, the operator allows it, and the job had its turn.

        Its turn, if chats held the slot against a job before: it completes a step, then trains for at least as long.
        """
        if not self._rules.preempts or self._preempted_job:
            return
        now = time.monotonic()
        with self._database.read() as connection:
            steps = inference.completed_steps(connection, claim.job_id, claim.token)
            base = inference.requested_base(connection, worker)
        if claim != self._claim:
            self._claim, self._first_step, self._training_since = claim, steps, None
        if steps > self._first_step and self._training_since is None:
            self._training_since = now
        trained_s = 0.0 if self._training_since is None else now - self._training_since
        had_turn = self._chat_held_s == 0.0 or (self._training_since is not None and trained_s >= self._chat_held_s)
        if base is None or not had_turn:
            return
        with self._database.write() as connection:
            self._preempted_job = inference.request_preemption(connection, claim.job_id, claim.token, utc_now())
        if self._preempted_job:
            log.info("job_preempted_by_chat", job=claim.job_id, base_model=base.base_model)

    def run(self, base: LoadedBase, worker: str, process: SlotProcess, stop: threading.Event) -> None:
        """Answers chats with the base, until the slot is needed for other work or `stop` is set.

        The base stays loaded if a job waits for the slot: it may be a job for this base.

        Raises:
            OSError: no process can be started.
        """
        for leftover in self._socket_dir.glob(f"{self._slot}-*.sock"):
            leftover.unlink()
        path = self._socket_dir / f"{self._slot}-{secrets.token_hex(4)}.sock"
        # The socket listens before its path is in the database, where clients find it.
        listener = listen(path)
        try:
            with listener:
                with self._database.write() as connection:
                    if not inference.assign_base(connection, base, worker, str(path)):
                        return
                pid = process.begin_chat(base, self._needed_base(base), listener)
            log.info("inference_started", base_model=base.base_model, slot=self._slot, pid=pid)
            keeps_base = False
            try:
                keeps_base = self._supervise(process, path, stop)
            finally:
                if not keeps_base:
                    process.end()
            log.info("inference_ended", base_model=base.base_model, slot=self._slot, base_kept=keeps_base)
        finally:
            path.unlink(missing_ok=True)
            persist(lambda: self._unregister(worker), DATABASE_PATIENCE_S)

    def _needed_base(self, base: LoadedBase) -> NeededBase | None:
        """The base in the terms of jobs; None if the catalog does not have it any more."""
        try:
            weights_sha256 = self._catalog.get(base.base_model).weights_sha256
        except QLoRAError:
            return None
        return NeededBase(weights_sha256, Quantization.model_validate_json(base.quantization))

    def _supervise(self, process: SlotProcess, path: Path, stop: threading.Event) -> bool:
        """Waits until the process answers no more chats; whether it idles with its base while a job waits."""
        policy = ChatSlotPolicy(self._rules, time.monotonic())
        is_yield_requested = False
        while (state := process.wait(POLL_S)) == "busy":
            if stop.is_set():
                process.request_yield()
                state = process.wait(STOP_GRACE_S)
                break
            verdict = self._decide(policy, path)
            if verdict == "yield" and not is_yield_requested:
                is_yield_requested = True
                process.request_yield()
            elif verdict == "kill":
                log.warning("inference_killed", slot=self._slot)
                process.send_signal(signal.SIGUSR1)  # prints the stacks of its threads into the log
                process.wait_for_end(POLL_S)
                break
        self._chat_held_s = 0.0 if policy.job_waiting_since is None else time.monotonic() - policy.job_waiting_since
        return state == "idle" and policy.job_waiting_since is not None and not stop.is_set()

    def _decide(self, policy: ChatSlotPolicy, path: Path) -> Verdict:
        """The policy's verdict on the current status and queue; during a database outage, as if nothing waited."""
        status = query_status(path, STATUS_TIMEOUT_S)
        try:
            with self._database.read() as connection:
                job_waits = inference.job_waits(connection, self._rules.max_running)
                other_waits = inference.another_is_requested(connection)
        except Exception as error:
            if not is_outage(error):
                raise
            job_waits = other_waits = False
        return policy.decide(time.monotonic(), status, job_waits=job_waits, other_waits=other_waits)

    def _unregister(self, worker: str) -> None:
        """Deletes the worker's socket from the database."""
        with self._database.write() as connection:
            inference.release_base(connection, worker)


def _is_idle(status: Status) -> bool:
    return not (status.loading or status.busy or status.in_line)
