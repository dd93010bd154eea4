"""Chats on a slot, between the jobs: when a base is loaded there, and how long it may stay. No torch."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog

from qlora_service.chat.wire import Status, ask_status, listen
from qlora_service.lifeline import kill_group
from qlora_service.queue import Claim, utc_now
from qlora_service.store import inference
from qlora_service.store.database import Database, is_outage, persist
from qlora_service.store.inference import LoadedBase

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
        device: str,
        environment: Mapping[str, str],
        socket_dir: Path,
        log_dir: Path,
    ) -> None:
        self._database = database
        self._rules = rules
        self._slot, self._device, self._environment = slot, device, environment
        self._socket_dir = socket_dir
        self._log_path = log_dir / f"inference-{slot}.log"
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

    def run(self, base: LoadedBase, worker: str, lock: int, stop: threading.Event) -> None:
        """Have the base loaded and answer chats, until it is time for something else; leaves no process behind."""
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
                child = self._start(base, listener.fileno(), lock)
            log.info("inference_started", base_model=base.base_model, slot=self._slot, pid=child.pid)
            try:
                self._see_through(child, path, stop)
            finally:
                kill_group(child)
                child.wait()
                assert child.stdin is not None
                with suppress(BrokenPipeError):
                    child.stdin.close()
            log.info("inference_ended", base_model=base.base_model, slot=self._slot, exit_code=child.returncode)
        finally:
            path.unlink(missing_ok=True)
            persist(lambda: self._give_up(worker), DATABASE_PATIENCE_S)

    def _start(self, base: LoadedBase, listener: int, lock: int) -> subprocess.Popen[bytes]:
        arguments = [base.base_model, base.quantization, self._device, str(listener)]
        with self._log_path.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "workers.inference", *arguments],
                stdin=subprocess.PIPE,  # a byte asks it to leave; its closing tells it that we are gone
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(self._environment),
                pass_fds=[lock, listener],
                start_new_session=True,
                bufsize=0,
            )

    def _see_through(self, child: subprocess.Popen[bytes], path: Path, stop: threading.Event) -> None:
        stay = Stay(self._rules, time.monotonic())
        asked_to_leave = False
        while True:
            with suppress(subprocess.TimeoutExpired):
                child.wait(LOOK_S)
                break
            if stop.is_set():
                _ask_to_leave(child)
                with suppress(subprocess.TimeoutExpired):
                    child.wait(STOP_GRACE_S)
                break
            verdict = self._judge(stay, path)
            if verdict == "leave" and not asked_to_leave:
                asked_to_leave = True
                _ask_to_leave(child)
            elif verdict == "end":
                log.warning("inference_killed", slot=self._slot, pid=child.pid)
                child.send_signal(signal.SIGUSR1)  # where its threads are, for the log
                with suppress(subprocess.TimeoutExpired):
                    child.wait(LOOK_S)
                break
        self._owed_s = 0.0 if stay.held_since is None else time.monotonic() - stay.held_since

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


def _ask_to_leave(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    with suppress(BrokenPipeError):
        child.stdin.write(b"\n")
