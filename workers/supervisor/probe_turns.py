"""Probes on a slot that has neither a job nor a chat: they time a step for a plan. No torch."""

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

POLL_S = 0.25
LIMIT_S = 600.0
"""Long enough to quantize a base of 70B parameters once"""
DATABASE_PATIENCE_S = 30.0

log = structlog.get_logger()


class ProbeTurns:
    """Probes on one slot. Used by the slot's thread only."""

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
        """`max_running` is the limit of running jobs per project."""
        self._database = database
        self._slot, self._device, self._environment = slot, device, environment
        self._log_path = log_dir / f"probe-{slot}.log"
        self._max_running = max_running

    def run_next(self, worker: str, lock: int, stop: threading.Event, empty_slot: Callable[[], None]) -> bool:
        """Runs the next requested probe, after `empty_slot`; False if none is requested.

        A job or chat that arrives meanwhile ends the probe, which is repeated later. Leaves no process behind.
        """
        with self._database.read() as connection:
            if not probes.has_probe(connection, worker, self._device):
                return False
        with self._database.write() as connection:
            probe = probes.take_probe(connection, worker, self._device)
        if probe is None:
            return False
        try:
            empty_slot()
            self._run(probe, worker, lock, stop)
        finally:
            persist(
                lambda: self._write(lambda connection: probes.release_probe(connection, worker)), DATABASE_PATIENCE_S
            )
        return True

    def _run(self, probe: Probe, worker: str, lock: int, stop: threading.Event) -> None:
        with self._log_path.open("wb") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", "workers.probe", probe.key, self._device],
                stdin=subprocess.PIPE,  # never written to; closes when the supervisor ends, and the probe exits
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(self._environment),
                pass_fds=[lock],
                start_new_session=True,
            )
        log.info("probe_started", slot=self._slot, pid=child.pid)
        try:
            interruption = self._wait(child, worker, stop)
        finally:
            kill_group(child)
            child.wait()
            assert child.stdin is not None
            child.stdin.close()
        log.info("probe_ended", slot=self._slot, exit_code=child.returncode, interruption=interruption)
        if interruption == "overdue" or (interruption is None and child.returncode != 0):
            # The error is stored, because a repeated probe would end the same way.
            end = f"took longer than {LIMIT_S:g} s" if interruption else f"ended with exit code {child.returncode}"
            result = {"error": f"the probe's process {end}; the worker's logs/{self._log_path.name} has more"}
            persist(
                lambda: self._write(lambda connection: probes.finish_probe(connection, probe.key, result, utc_now())),
                DATABASE_PATIENCE_S,
            )

    def _wait(self, child: subprocess.Popen[bytes], worker: str, stop: threading.Event) -> str | None:
        """Waits for the probe's end, or for a reason to end it; returns the reason, None when it has ended."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            with suppress(subprocess.TimeoutExpired):
                child.wait(POLL_S)
                return None
            if stop.is_set():
                return "stopped"
            if time.monotonic() > deadline:
                return "overdue"
            if self._is_slot_needed(worker):
                return "others wait"

    def _is_slot_needed(self, worker: str) -> bool:
        """Whether a job or a chat waits; False during a database outage."""
        try:
            with self._database.read() as connection:
                if inference.job_waits(connection, self._max_running):
                    return True
                return inference.requested_base(connection, worker) is not None
        except Exception as error:
            if not is_outage(error):
                raise
            return False

    def _write(self, statement: Callable[[Any], object]) -> None:
        with self._database.write() as connection:
            statement(connection)
