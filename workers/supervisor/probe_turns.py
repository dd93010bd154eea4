"""Probes on a slot that has neither a job nor a chat: steps that a plan wants timed. No torch."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from qlora_service.domain.clock import utc_now
from qlora_service.process.child import kill_group
from qlora_service.store import inference, probes
from qlora_service.store.database import Database, is_outage, persist
from qlora_service.store.probes import Probe

LOOK_S = 0.25
LIMIT_S = 600.0
"""A base of 70B parameters is quantized, once, within it"""
DATABASE_PATIENCE_S = 30.0

log = structlog.get_logger()


class ProbeTurns:
    """Probes on one slot. Used by the slot's thread alone."""

    def __init__(
        self,
        database: Database,
        *,
        slot: str,
        device: str,
        environment: Mapping[str, str],
        log_dir: Path,
        max_running: int | None,
    ) -> None:
        """`max_running` is how many jobs of one project may run at a time."""
        self._database = database
        self._slot, self._device, self._environment = slot, device, environment
        self._log_path = log_dir / f"probe-{slot}.log"
        self._max_running = max_running

    def run_next(self, worker: str, lock: int, stop: threading.Event, make_room: Callable[[], None]) -> bool:
        """Have the next probe's step timed, once `make_room` has emptied the slot; False where none waits.

        It makes way for a job or a chat that comes in the meantime, and is taken again when they are done. Leaves no
        process behind.
        """
        with self._database.read() as connection:
            if not probes.is_wanted(connection, worker, self._device):
                return False
        with self._database.write() as connection:
            probe = probes.take_probe(connection, worker, self._device)
        if probe is None:
            return False
        try:
            make_room()
            self._run(probe, worker, lock, stop)
        finally:
            persist(lambda: self._write(lambda connection: probes.give_back(connection, worker)), DATABASE_PATIENCE_S)
        return True

    def _run(self, probe: Probe, worker: str, lock: int, stop: threading.Event) -> None:
        with self._log_path.open("wb") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", "workers.probe", probe.key, self._device],
                stdin=subprocess.PIPE,  # never written to: its closing tells the probe that we are gone
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(self._environment),
                pass_fds=[lock],
                start_new_session=True,
            )
        log.info("probe_started", slot=self._slot, pid=child.pid)
        try:
            why = self._see_through(child, worker, stop)
        finally:
            kill_group(child)
            child.wait()
            assert child.stdin is not None
            child.stdin.close()
        log.info("probe_ended", slot=self._slot, exit_code=child.returncode, made_way=why)
        if why == "overdue" or (why is None and child.returncode != 0):
            # Asked again, it would end the same way.
            how = f"took longer than {LIMIT_S:g} s" if why else f"ended with exit code {child.returncode}"
            result = {"error": f"the process that timed it {how}; the worker's logs/{self._log_path.name} has more"}
            persist(
                lambda: self._write(lambda connection: probes.finish_probe(connection, probe.key, result, utc_now())),
                DATABASE_PATIENCE_S,
            )

    def _see_through(self, child: subprocess.Popen[bytes], worker: str, stop: threading.Event) -> str | None:
        """Why the probe has to end before it has; None when it has ended."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            with suppress(subprocess.TimeoutExpired):
                child.wait(LOOK_S)
                return None
            if stop.is_set():
                return "stopped"
            if time.monotonic() > deadline:
                return "overdue"
            if self._others_wait(worker):
                return "others wait"

    def _others_wait(self, worker: str) -> bool:
        try:
            with self._database.read() as connection:
                if inference.job_waits(connection, self._max_running):
                    return True
                return inference.wanted_base(connection, worker) is not None
        except Exception as error:
            if not is_outage(error):
                raise
            return False

    def _write(self, what: Callable[[Any], object]) -> None:
        with self._database.write() as connection:
            what(connection)
