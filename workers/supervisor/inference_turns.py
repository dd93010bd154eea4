"""Chats on a slot, between the jobs: when a base is loaded there, and how long it may stay. No torch."""

from __future__ import annotations

import secrets
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog

from qlora_service.chat.wire import Status, ask_status, listen
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

LOOK_S = 0.25
PRESSED_S = 1.0
"""What waits for so long is not for another slot to take."""
UNANSWERED_S = 60.0
"""A process that does not say for so long what it is at stands still."""
LOADING_PATIENCE = 6
"""How many times longer than a token the base may take to load"""
DRAIN_SHARE = 0.5
"""Of the time that chats may hold a slot: then nothing more is begun, so that what has begun can end."""
STATUS_S = 1.0
STOP_GRACE_S = 2.0
DATABASE_PATIENCE_S = 30.0

log = structlog.get_logger()
Verdict = Literal["stay", "leave", "end"]


@dataclass(frozen=True)
class ChatRules:
    """What the operator allows chats; see the settings of the same names."""

    idle_s: float
    hold_s: float
    preempts: bool
    hang_s: float
    max_running: int | None


class Stay:
    """Whether a process that answers chats may stay on its slot. Pure: times are given."""

    def __init__(self, rules: ChatRules, now: float) -> None:
        self._rules = rules
        self._heard_at = now
        self._loaded_at: float | None = None
        self._pressed_at: float | None = None
        self._asked_at: float | None = None
        self.held_since: float | None = None
        """Since when a job has waited for the slot"""

    def judge(self, now: float, status: Status | None, *, job_waits: bool, other_waits: bool) -> Verdict:
        """`status` is None when it does not answer; `other_waits` when somebody wants to chat with another base."""
        rules = self._rules
        self._pressed_at = (self._pressed_at or now) if job_waits or other_waits else None
        self.held_since = (self.held_since or now) if job_waits else None
        if status is None:
            return "end" if now - self._heard_at > min(UNANSWERED_S, rules.hang_s) else "stay"
        self._heard_at = now
        if not status.loading:
            self._loaded_at = self._loaded_at or now
        works = status.loading or status.busy
        if works and status.quiet_s > rules.hang_s * (LOADING_PATIENCE if status.loading else 1):
            return "end"
        pressed_s = 0.0 if self._pressed_at is None else now - self._pressed_at
        if pressed_s < PRESSED_S:
            return "leave" if _is_idle(status) and status.quiet_s >= rules.idle_s else "stay"
        if job_waits and not rules.preempts:
            return "end" if pressed_s > rules.hold_s else "leave"
        # It may have got the slot for those who wait: they are served first, however long the loading takes.
        held_s = 0.0 if self._loaded_at is None else min(pressed_s, now - self._loaded_at)
        return "end" if held_s > rules.hold_s else self._serve_first(status, held_s)

    def _serve_first(self, status: Status, held_s: float) -> Verdict:
        served = _is_idle(status) and (status.served > 0 or held_s > PRESSED_S)
        return "leave" if served or held_s > DRAIN_SHARE * self._rules.hold_s else "stay"


def _is_idle(status: Status) -> bool:
    return not (status.loading or status.busy or status.in_line)


class ChatTurns:
    """Chats on one slot. Used by the slot's thread alone."""

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
        self._made_way = False
        # What the running job is owed: it trains for as long as chats held the slot against a job before.
        self._owed_s = 0.0
        self._claim: Claim | None = None
        self._steps_before = 0
        self._trains_since: float | None = None

    def first(self, worker: str) -> LoadedBase | None:
        """The base to load now, ahead of every job: one has made way for it."""
        made_way, self._made_way = self._made_way, False
        return self.wanted(worker) if made_way else None

    def wanted(self, worker: str) -> LoadedBase | None:
        """The base to load if no job waits."""
        with self._database.read() as connection:
            return inference.wanted_base(connection, worker)

    def consider(self, claim: Claim, worker: str) -> None:
        """Ask the slot's job to make way, if somebody waits to chat, the operator allows it and the job had its share.

        It has when it got further by a step, and has trained for as long as chats held the slot before.
        """
        if not self._rules.preempts or self._made_way:
            return
        now = time.monotonic()
        with self._database.read() as connection:
            steps = inference.steps_done(connection, claim.job_id, claim.token)
            base = inference.wanted_base(connection, worker)
        if claim != self._claim:
            self._claim, self._steps_before, self._trains_since = claim, steps, None
        if steps > self._steps_before and self._trains_since is None:
            self._trains_since = now
        trained_s = 0.0 if self._trains_since is None else now - self._trains_since
        had_share = self._owed_s == 0.0 or (self._trains_since is not None and trained_s >= self._owed_s)
        if base is None or not had_share:
            return
        with self._database.write() as connection:
            self._made_way = inference.ask_to_make_way(connection, claim.job_id, claim.token, utc_now())
        if self._made_way:
            log.info("job_makes_way", job=claim.job_id, base_model=base.base_model)

    def run(self, base: LoadedBase, worker: str, process: SlotProcess, stop: threading.Event) -> None:
        """Have chats answered with the base, until it is time for something else.

        The base stays loaded if a job waits for the slot, which may be one for this base.

        Raises:
            OSError: no process to be had.
        """
        for left_over in self._socket_dir.glob(f"{self._slot}-*.sock"):
            left_over.unlink()
        path = self._socket_dir / f"{self._slot}-{secrets.token_hex(4)}.sock"
        # Whoever finds the socket in the database can connect: it is open before it is there.
        listener = listen(path)
        try:
            with listener:
                with self._database.write() as connection:
                    if not inference.take(connection, base, worker, str(path)):
                        return
                pid = process.begin_chat(base, self._needed(base), listener)
            log.info("inference_started", base_model=base.base_model, slot=self._slot, pid=pid)
            is_useful = False
            try:
                is_useful = self._see_through(process, path, stop)
            finally:
                if not is_useful:
                    process.end()
            log.info("inference_ended", base_model=base.base_model, slot=self._slot, base_stays=is_useful)
        finally:
            path.unlink(missing_ok=True)
            persist(lambda: self._give_up(worker), DATABASE_PATIENCE_S)

    def _needed(self, base: LoadedBase) -> NeededBase | None:
        """The base as jobs need it; None if the catalog does not have it any more."""
        try:
            weights_sha256 = self._catalog.get(base.base_model).weights_sha256
        except QLoRAError:
            return None
        return NeededBase(weights_sha256, Quantization.model_validate_json(base.quantization))

    def _see_through(self, process: SlotProcess, path: Path, stop: threading.Event) -> bool:
        """Returns once nothing is answered any more; whether a job waits that may need the process and its base."""
        stay = Stay(self._rules, time.monotonic())
        asked_to_leave = False
        while (state := process.wait(LOOK_S)) == "works":
            if stop.is_set():
                process.ask_to_leave()
                state = process.wait(STOP_GRACE_S)
                break
            verdict = self._judge(stay, path)
            if verdict == "leave" and not asked_to_leave:
                asked_to_leave = True
                process.ask_to_leave()
            elif verdict == "end":
                log.warning("inference_killed", slot=self._slot)
                process.send_signal(signal.SIGUSR1)  # where its threads are, for the log
                process.wait_for_end(LOOK_S)
                break
        self._owed_s = 0.0 if stay.held_since is None else time.monotonic() - stay.held_since
        return state == "waits" and stay.held_since is not None and not stop.is_set()

    def _judge(self, stay: Stay, path: Path) -> Verdict:
        status = ask_status(path, STATUS_S)
        try:
            with self._database.read() as connection:
                job_waits = inference.job_waits(connection, self._rules.max_running)
                other_waits = inference.another_is_wanted(connection)
        except Exception as error:
            if not is_outage(error):
                raise
            job_waits = other_waits = False
        return stay.judge(time.monotonic(), status, job_waits=job_waits, other_waits=other_waits)

    def _give_up(self, worker: str) -> None:
        with self._database.write() as connection:
            inference.give_up(connection, worker)
