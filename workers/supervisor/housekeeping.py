"""What a worker does for the queue as a whole, beside running jobs: rescue, make room, tidy up."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from pathlib import Path

import structlog

from qlora_service.artifacts.store import ArtifactStore, dataset_key
from qlora_service.domain.clock import utc_now
from qlora_service.errors import NotFound
from qlora_service.queue.claim import Claim
from qlora_service.queue.queue import Queue
from qlora_service.store.database import Database
from qlora_service.store.datasets import all_needed_bytes, are_bytes_needed, first_stored_at, lock_bytes
from qlora_service.store.jobs import get_job
from qlora_service.store.probes import drop_old
from qlora_service.training.checkpoint.disk_reserve import RESERVE_FILE

REAP_EVERY_S = 60.0
UNFINISHED_S = 24 * 3600.0
"""A file that nobody wrote to for so long is not being written."""

log = structlog.get_logger()


class Housekeeping:
    """Over one data directory. Every action may be repeated, and be done by several workers at once."""

    def __init__(
        self, *, database: Database, queue: Queue, artifacts: ArtifactStore, tmp_dir: Path, checkpoint_dir: Path
    ) -> None:
        self._database = database
        self._queue = queue
        self._artifacts = artifacts
        self._tmp_dir = tmp_dir
        self._checkpoint_dir = checkpoint_dir
        self._next_reap = 0.0
        checkpoint_dir.mkdir(parents=True, exist_ok=True)

    def tick(self, preemptible: Collection[str], *, slot_is_free: bool = False) -> None:
        """Look once after lost, held and urgent jobs; `preemptible` workers may be asked to make room."""
        for job_id in self._queue.requeue_lost():
            log.warning("job_requeued", job=job_id, reason="its lease expired")
        for job_id in self._queue.resume_held(shutil.disk_usage(self._checkpoint_dir).free):
            log.info("job_resumed", job=job_id, reason="there is room on the disk again")
        if preemptible and (victim := self._queue.preempt(preemptible, slot_is_free=slot_is_free)):
            log.info("job_preempted", job=victim)
        if time.monotonic() >= self._next_reap:
            self._next_reap = time.monotonic() + REAP_EVERY_S
            self._reap()

    def make_room(self, claim: Claim) -> None:
        """Give up the disk space that an attempt held which has ended: the database may need it."""
        (self._checkpoint_dir / claim.job_id / RESERVE_FILE).unlink(missing_ok=True)

    def after_attempt(self, claim: Claim) -> None:
        """Remove what the attempt needed while it ran, and all that a job that has ended will not need again."""
        shutil.rmtree(self._tmp_dir / claim.name, ignore_errors=True)
        self._reap_checkpoints(claim.job_id)

    def _reap(self) -> None:
        """Remove what killed supervisors' attempts left behind, checkpoints of jobs that have ended, and old probes."""
        for path in self._tmp_dir.glob("job_*-*"):
            job_id, _, token = path.name.rpartition("-")
            if token.isdigit() and not self._queue.is_running(Claim(job_id, int(token))):
                shutil.rmtree(path, ignore_errors=True)
        for path in self._checkpoint_dir.glob("job_*"):
            self._reap_checkpoints(path.name)
        self._artifacts.remove_unfinished(UNFINISHED_S)
        with self._database.write() as connection:
            drop_old(connection, utc_now())
        self._reap_datasets()

    def _reap_datasets(self) -> None:
        """Remove bytes that were stored for a dataset whose row was never written: whoever stored them died before."""
        with self._database.read() as connection:
            needed, first = all_needed_bytes(connection), first_stored_at(connection)
        if first is None:
            return
        # What is older than all that this database knows was stored under another one; not ours to remove.
        for sha256 in self._artifacts.datasets_since(first.timestamp(), UNFINISHED_S):
            if sha256 in needed:
                continue
            with self._database.write() as connection:
                lock_bytes(connection, sha256)
                if not are_bytes_needed(connection, sha256):
                    self._artifacts.remove(dataset_key(sha256))
                    log.info("dataset_bytes_removed", sha256=sha256, reason="no dataset was made of them")

    def _reap_checkpoints(self, job_id: str) -> None:
        directory = self._checkpoint_dir / job_id
        if not directory.exists():
            return
        try:
            with self._database.read() as connection:
                job = get_job(connection, job_id)
        except NotFound:
            return  # of another database; not ours to remove
        if job.status.terminal:
            # The directory goes last: while it is there, this is done again after a crash.
            self._artifacts.remove_attempts(job_id, keep=job.published_attempt)
            shutil.rmtree(directory, ignore_errors=True)
