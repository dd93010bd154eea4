"""Heartbeat of a trainer: renews its claim, and exits the process when the claim is lost or the attempt hangs."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable

import structlog

from qlora_service.domain.jobs import HoldReason, StopRequest
from qlora_service.errors import ClaimLost, Interrupted, JobCancelled
from qlora_service.queue.claim import Claim
from qlora_service.queue.queue import Queue
from workers import exit_codes
from workers.disk_space import is_disk_full

EXIT_SHARE, KILL_SHARE = 0.7, 0.8
"""Shares of the lease without a renewal after which the process exits: by itself, or else by faulthandler's watchdog,
which does not need the GIL. Both come before a newer claim can take the job."""
HANG_FACTOR = 20
"""An attempt hangs when a check takes longer than `hang_s` and than this many times the longest of its phase."""
PACE_CHECKS = 10
"""Checks of a phase after which its pace counts as known"""
UNKNOWN_PACE_FACTOR = 6
"""Multiplies `hang_s` while the pace is unknown"""

log = structlog.get_logger()


class Heartbeat:
    """Renews the claim in a background thread, and holds the reasons for which the attempt should stop."""

    def __init__(
        self,
        queue: Queue,
        claim: Claim,
        *,
        interval_s: float,
        lease_s: float,
        hang_s: float,
        free_disk_space: Callable[[], None] = lambda: None,
    ) -> None:
        """`free_disk_space` is called when a renewal fails because the disk is full."""
        self._queue, self._claim = queue, claim
        self._free_disk_space = free_disk_space
        self._is_disk_full = False
        self._interval_s, self._lease_s, self._hang_s = interval_s, lease_s, hang_s
        self._request: StopRequest | None = None
        self._stop_requested = threading.Event()
        self._ended = threading.Event()
        self._watchdog_lock = threading.Lock()
        self._is_closed = False
        self._renewed_at = self._checked_at = time.monotonic()
        self._longest_s, self._checks = 0.0, 0

    def start(self) -> None:
        """Returns once the claim is renewed; from then on the process does not outlive its lease."""
        self._arm_watchdog()
        # Until this renewal the lease counts from the claim, which may be much older than this process.
        while not self._try_renew() and not self._is_disk_full:
            time.sleep(self._interval_s)
        threading.Thread(target=self._renew_repeatedly, name="claim", daemon=True).start()

    def request_stop(self) -> None:
        """Makes the next `check` raise; safe in a signal handler."""
        self._stop_requested.set()

    def stop_renewing(self) -> None:
        """Ends the renewals, before the attempt's outcome is written."""
        self._ended.set()

    def close(self) -> None:
        """Disarms the watchdog, after the outcome was written: the process may outlive the lease."""
        self._ended.set()
        with self._watchdog_lock:
            self._is_closed = True
            faulthandler.cancel_dump_traceback_later()

    @property
    def is_stopping(self) -> bool:
        """Whether `request_stop` was called."""
        return self._stop_requested.is_set()

    def receive(self, request: StopRequest | None) -> None:
        """Stores the queue's answer to a renewal or a report; the next `check` acts on it."""
        self._request = request

    def enter_phase(self) -> None:
        """Forgets the pace of the phase before."""
        self._checked_at = time.monotonic()
        self._longest_s, self._checks = 0.0, 0

    def check(self) -> None:
        """Records progress, and raises if the attempt should stop.

        Raises:
            JobCancelled: cancelled by the user.
            Interrupted: the attempt is to resume later.
        """
        now = time.monotonic()
        self._longest_s, self._checks = max(self._longest_s, now - self._checked_at), self._checks + 1
        self._checked_at = now
        if self._request is StopRequest.CANCEL:
            raise JobCancelled("the job was cancelled")
        if self._stop_requested.is_set():
            raise Interrupted("the worker was stopped")
        if self._is_disk_full:
            raise Interrupted("the disk is full", hold=HoldReason.DISK_FULL)
        if self._request is StopRequest.PAUSE:
            raise Interrupted("paused until it is resumed", hold=HoldReason.USER)
        if self._request is StopRequest.PREEMPT:
            raise Interrupted("preempted by a job with a higher priority, or by a chat")

    def _renew_repeatedly(self) -> None:
        while not self._ended.wait(self._interval_s):
            if time.monotonic() - self._checked_at > self._patience_s():
                self._exit(exit_codes.HUNG, "trainer_hangs", patience_s=self._patience_s())
            self._try_renew()

    def _try_renew(self) -> bool:
        """Whether the claim was renewed. Exits the process if the claim is lost, or the lease too close to its end."""
        started_at = time.monotonic()
        try:
            self.receive(self._queue.renew(self._claim))
            self._renewed_at = started_at
            self._arm_watchdog()
            return True
        except ClaimLost:
            if not self._ended.is_set():
                log.error("claim_lost", job=self._claim.job_id, token=self._claim.token)
                os._exit(exit_codes.CLAIM_LOST)
        except Exception as error:  # noqa: BLE001 - any other error may be temporary: the next renewal tries again
            log.warning("claim_renewal_failed", job=self._claim.job_id, error=str(error))
            if is_disk_full(error):
                self._is_disk_full = True
                self._free_disk_space()
            elif not self._ended.is_set() and time.monotonic() - self._renewed_at > EXIT_SHARE * self._lease_s:
                self._exit(exit_codes.NO_DATABASE, "claim_not_renewed")
        return False

    def _patience_s(self) -> float:
        """Seconds until the next check before the attempt counts as hanging."""
        is_pace_known = self._checks >= PACE_CHECKS
        return max(self._hang_s * (1 if is_pace_known else UNKNOWN_PACE_FACTOR), HANG_FACTOR * self._longest_s)

    def _arm_watchdog(self) -> None:
        left_s = KILL_SHARE * self._lease_s - (time.monotonic() - self._renewed_at)
        with self._watchdog_lock:
            if not self._is_closed:  # a slow renewal would arm the watchdog against the process's later work
                faulthandler.dump_traceback_later(max(left_s, 0.001), exit=True)

    def _exit(self, code: int, event: str, **values: object) -> None:
        log.error(event, job=self._claim.job_id, token=self._claim.token, **values)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(code)
