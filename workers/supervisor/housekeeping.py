"""Housekeeping of a worker: requeue lost jobs, resume and preempt jobs, free disk space, delete leftovers."""

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
from qlora_service.store.probes import delete_expired
from qlora_service.training.checkpoint.disk_reserve import RESERVE_FILE

REAP_EVERY_S = 60.0
UNFINISHED_S = 24 * 3600.0
"""A file without a write for this long is not being written any more."""

log = structlog.get_logger()


class Housekeeping:
    """Works on one data directory. Every action is idempotent and safe to run in several workers at once."""

    def __init__(
        self, *, database: Database, queue: Queue, artifacts: ArtifactStore, tmp_dir: Path, checkpoint_dir: Path
    ) -> None:
        self._database = database
        self._queue = queue
        self._artifacts = artifacts
        self._tmp_dir = tmp_dir
        self._checkpoint_dir = checkpoint_dir
        self._next_reap_at = 0.0
        checkpoint_dir.mkdir(parents=True, exist_ok=True)

    def tick(self, preemptible: Collection[str], *, slot_is_free: bool = False) -> None:
        """One pass over lost, held and urgent jobs; jobs of the workers in `preemptible` may be preempted."""
        for job_id in self._queue.requeue_lost():
            log.warning("job_requeued", job=job_id, reason="its lease expired")
        for job_id in self._queue.resume_held(shutil.disk_usage(self._checkpoint_dir).free):
            log.info("job_resumed", job=job_id, reason="the disk has enough free space again")
        if preemptible and (victim := self._queue.preempt(preemptible, slot_is_free=slot_is_free)):
            log.info("job_preempted", job=victim)
        if time.monotonic() >= self._next_reap_at:
            self._next_reap_at = time.monotonic() + REAP_EVERY_S
            self._reap()

    def release_reserve(self, claim: Claim) -> None:
        """Frees the disk space that an ended attempt had reserved: the database may need it."""
        (self._checkpoint_dir / claim.job_id / RESERVE_FILE).unlink(missing_ok=True)

    def after_attempt(self, claim: Claim) -> None:
        """Deletes the attempt's scratch files, and the checkpoints of a job that has ended."""
        shutil.rmtree(self._tmp_dir / claim.name, ignore_errors=True)
        self._reap_checkpoints(claim.job_id)

    def _reap(self) -> None:
        """Deletes leftovers of killed supervisors, checkpoints of jobs that have ended, and old probes."""
        for path in self._tmp_dir.glob("job_*-*"):
            job_id, _, token = path.name.rpartition("-")
            if token.isdigit() and not self._queue.is_running(Claim(job_id, int(token))):
                shutil.rmtree(path, ignore_errors=True)
        for path in self._checkpoint_dir.glob("job_*"):
            self._reap_checkpoints(path.name)
        self._artifacts.remove_unfinished(UNFINISHED_S)
        with self._database.write() as connection:
            delete_expired(connection, utc_now())
        self._reap_datasets()

    def _reap_datasets(self) -> None:
        """Deletes the bytes of datasets without a row: the process that stored them died before it wrote the row."""
        with self._database.read() as connection:
            needed, first = all_needed_bytes(connection), first_stored_at(connection)
        if first is None:
            return
        # Bytes older than this database's first dataset belong to another database.
        for sha256 in self._artifacts.datasets_since(first.timestamp(), UNFINISHED_S):
            if sha256 in needed:
                continue
            with self._database.write() as connection:
                lock_bytes(connection, sha256)
                if not are_bytes_needed(connection, sha256):
                    self._artifacts.remove(dataset_key(sha256))
                    log.info("dataset_bytes_removed", sha256=sha256, reason="no dataset has these bytes")

    def _reap_checkpoints(self, job_id: str) -> None:
        directory = self._checkpoint_dir / job_id
        if not directory.exists():
            return
        try:
            with self._database.read() as connection:
                job = get_job(connection, job_id)
        except NotFound:
            return  # the directory belongs to another database
        if job.status.terminal:
            # The directory is deleted last: as long as it exists, the next pass repeats what a crash interrupted.
            self._artifacts.remove_attempts(job_id, keep=job.published_attempt)
            shutil.rmtree(directory, ignore_errors=True)
