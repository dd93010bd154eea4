"""Keeps a trainer's claim, and ends the process when it has none, or no progress."""

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

RENEW_SHARE, KILL_SHARE = 0.7, 0.8
"""Of the lease: without a renewal for so long the process ends, by itself or by the interpreter's own watchdog, which
needs no lock of the interpreter's. Both come before the lease can be another's."""
LONGER_THAN_EVER = 20
"""A sign of progress that takes so many times longer than any before will not come."""
SIGNS_TO_LEARN = 10
UNKNOWN_PACE = 6
"""How many times `hang_s` a sign may take, before so many were seen in this phase that their pace is known."""

log = structlog.get_logger()


class ClaimKeeper:
    """Renews the claim in the background and knows whether the attempt should stop."""

    def __init__(
        self,
        queue: Queue,
        claim: Claim,
        *,
        interval_s: float,
        lease_s: float,
        hang_s: float,
        make_room: Callable[[], None] = lambda: None,
    ) -> None:
        """`make_room` is called when the database finds the disk full."""
        self._queue, self._claim = queue, claim
        self._make_room = make_room
        self._disk_is_full = False
        self._interval_s, self._lease_s, self._hang_s = interval_s, lease_s, hang_s
        self._request: StopRequest | None = None
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._watching = threading.Lock()
        self._is_closed = False
        self._renewed_at = self._alive_at = time.monotonic()
        self._longest_s, self._signs = 0.0, 0

    def start(self) -> None:
        """Returns once the claim is renewed; from then on the process does not outlive it."""
        self._watch_lease()
        # Until then the lease counts from the claim, which may have been long before this process.
        while not self._renewed() and not self._disk_is_full:
            time.sleep(self._interval_s)
        threading.Thread(target=self._renew, name="claim", daemon=True).start()

    def stop(self) -> None:
        """Ask for a stop at the next step boundary; safe in a signal handler."""
        self._stopping.set()

    def end(self) -> None:
        """The attempt's outcome is about to be written: renew no more."""
        self._ended.set()

    def close(self) -> None:
        """The outcome is written: the process may live on."""
        self._ended.set()
        with self._watching:
            self._is_closed = True
            faulthandler.cancel_dump_traceback_later()

    @property
    def is_stopping(self) -> bool:
        """Whether the process was asked to stop."""
        return self._stopping.is_set()

    def heard(self, request: StopRequest | None) -> None:
        """Note what the queue asked for when something was reported to it."""
        self._request = request

    def enter_phase(self) -> None:
        """What comes now may take longer than what came before."""
        self._alive_at = time.monotonic()
        self._longest_s, self._signs = 0.0, 0

    def check(self) -> None:
        """A sign of progress.

        Raises:
            JobCancelled: its user wants no more of it.
            Interrupted: it is to go on later.
        """
        now = time.monotonic()
        self._longest_s, self._signs = max(self._longest_s, now - self._alive_at), self._signs + 1
        self._alive_at = now
        if self._request is StopRequest.CANCEL:
            raise JobCancelled("the job was cancelled")
        if self._stopping.is_set():
            raise Interrupted("the worker was stopped")
        if self._disk_is_full:
            raise Interrupted("the disk is full", hold=HoldReason.DISK_FULL)
        if self._request is StopRequest.PAUSE:
            raise Interrupted("paused until it is resumed", hold=HoldReason.USER)
        if self._request is StopRequest.PREEMPT:
            raise Interrupted("it makes way, as it was asked to")

    def _renew(self) -> None:
        while not self._ended.wait(self._interval_s):
            if time.monotonic() - self._alive_at > self._patience_s():
                self._exit(exit_codes.HUNG, "trainer_hangs", patience_s=self._patience_s())
            self._renewed()

    def _renewed(self) -> bool:
        """Whether the claim was renewed just now; ends the process when it is lost, or has to be taken for lost."""
        began_at = time.monotonic()
        try:
            self.heard(self._queue.renew(self._claim))
            self._renewed_at = began_at
            self._watch_lease()
            return True
        except ClaimLost:
            if not self._ended.is_set():
                log.error("claim_lost", job=self._claim.job_id, token=self._claim.token)
                os._exit(exit_codes.CLAIM_LOST)
        except Exception as error:  # noqa: BLE001 - a locked database passes; a lost claim is told above
            log.warning("renew_failed", job=self._claim.job_id, error=str(error))
            if is_disk_full(error):
                self._disk_is_full = True
                self._make_room()
            elif not self._ended.is_set() and time.monotonic() - self._renewed_at > RENEW_SHARE * self._lease_s:
                self._exit(exit_codes.NO_DATABASE, "claim_not_renewed")
        return False

    def _patience_s(self) -> float:
        """How long the next sign of progress may take."""
        pace_is_known = self._signs >= SIGNS_TO_LEARN
        return max(self._hang_s * (1 if pace_is_known else UNKNOWN_PACE), LONGER_THAN_EVER * self._longest_s)

    def _watch_lease(self) -> None:
        left = KILL_SHARE * self._lease_s - (time.monotonic() - self._renewed_at)
        with self._watching:
            if not self._is_closed:  # a renewal that took long would set the watchdog on what comes after
                faulthandler.dump_traceback_later(max(left, 0.001), exit=True)

    def _exit(self, code: int, event: str, **values: object) -> None:
        log.error(event, job=self._claim.job_id, token=self._claim.token, **values)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(code)
