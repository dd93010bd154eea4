"""Housekeeping on a real database, queue and file system."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from qlora_service.artifacts.store import ArtifactStore, dataset_key, job_key
from qlora_service.domain.jobs import HoldReason, JobStatus, StopRequest
from qlora_service.queue.claim import Claim
from qlora_service.queue.queue import Queue
from qlora_service.queue.requests import request_cancel
from qlora_service.store.database import Database
from qlora_service.store.datasets import mark_deleted
from qlora_service.store.jobs import get_job
from qlora_service.store.tables import jobs
from qlora_service.training.checkpoint.disk_reserve import RESERVE_FILE, DiskReserve
from tests.control_plane import LEASE_S, START, SteppedClock, add_job
from workers.supervisor.housekeeping import Housekeeping


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore((tmp_path / "artifacts").as_uri())


@pytest.fixture
def housekeeping(tmp_path: Path, database: Database, queue: Queue, artifacts: ArtifactStore) -> Housekeeping:
    return Housekeeping(
        database=database,
        queue=queue,
        artifacts=artifacts,
        tmp_dir=tmp_path / "tmp",
        checkpoint_dir=tmp_path / "checkpoints",
    )


def claim_next(queue: Queue, worker: str = "a") -> Claim:
    claimed = queue.claim(worker)
    assert claimed is not None
    return claimed[0]


def status(database: Database, job_id: str) -> JobStatus:
    with database.read() as connection:
        return get_job(connection, job_id).status


def test_lost_jobs_are_requeued(
    housekeeping: Housekeeping, database: Database, queue: Queue, clock: SteppedClock
) -> None:
    add_job(database)
    claim = claim_next(queue)
    clock.advance(LEASE_S + 1)
    housekeeping.tick(preemptible=[])
    assert status(database, claim.job_id) is JobStatus.QUEUED


def test_jobs_paused_by_a_full_disk_resume_when_space_is_free(
    housekeeping: Housekeeping, database: Database, queue: Queue
) -> None:
    small, large = add_job(database), add_job(database)
    for needed in (1, 2**60):
        hold = {"reason": HoldReason.DISK_FULL, "message": "full", "needs_bytes": needed}
        queue.pause(claim_next(queue), hold)
    housekeeping.tick(preemptible=[])
    assert sorted([status(database, small), status(database, large)]) == [JobStatus.PAUSED, JobStatus.QUEUED]


def test_only_jobs_of_preemptible_workers_are_preempted(
    housekeeping: Housekeeping, database: Database, queue: Queue
) -> None:
    add_job(database)
    claim = claim_next(queue)
    add_job(database, priority=1)
    housekeeping.tick(preemptible=[])
    assert queue.stop_request(claim) is None
    housekeeping.tick(preemptible=["a"])
    assert queue.stop_request(claim) is StopRequest.PREEMPT


def store(artifacts: ArtifactStore, tmp_path: Path, claim: Claim) -> str:
    (tmp_path / "file").write_text("bytes")
    key = job_key(claim.job_id, claim.token, "adapter_model.safetensors")
    artifacts.put_file(key, tmp_path / "file")
    return key


def test_of_an_ended_job_only_published_files_are_kept(
    housekeeping: Housekeeping, database: Database, queue: Queue, artifacts: ArtifactStore, tmp_path: Path
) -> None:
    add_job(database)
    first = claim_next(queue)
    lost = store(artifacts, tmp_path, first)
    unfinished = tmp_path / "artifacts" / "jobs" / first.job_id / "1" / "README.md#1"
    unfinished.write_text("half")
    checkpoints = tmp_path / "checkpoints" / first.job_id / "step-00000001.a1"
    checkpoints.mkdir(parents=True)
    (tmp_path / "tmp" / first.name).mkdir(parents=True)
    queue.died(first, {"message": "killed"})
    housekeeping.after_attempt(first)
    assert not (tmp_path / "tmp" / first.name).exists()
    assert checkpoints.exists()  # the next attempt resumes from it
    second = claim_next(queue)
    published = store(artifacts, tmp_path, second)
    queue.succeed(second, {"attempt": second.token})
    housekeeping.after_attempt(second)
    assert not checkpoints.parent.exists()
    assert b"".join(artifacts.read(published)) == b"bytes"
    assert not (tmp_path / "artifacts" / lost).exists()
    assert not unfinished.exists()


def test_the_reserve_of_a_dead_attempt_is_released_and_its_checkpoints_are_kept(
    housekeeping: Housekeeping, queue: Queue, database: Database, tmp_path: Path
) -> None:
    add_job(database)
    claim = claim_next(queue)
    directory = tmp_path / "checkpoints" / claim.job_id
    (directory / "step-00000001.a1").mkdir(parents=True)
    DiskReserve(directory / RESERVE_FILE).reserve(2**20)
    for _ in range(2):
        housekeeping.release_reserve(claim)
    assert [path.name for path in directory.iterdir()] == ["step-00000001.a1"]


def test_the_kept_attempt_of_a_failed_job_stays(
    housekeeping: Housekeeping, database: Database, queue: Queue, artifacts: ArtifactStore, tmp_path: Path
) -> None:
    add_job(database)
    claim = claim_next(queue)
    kept = store(artifacts, tmp_path, claim)
    (tmp_path / "checkpoints" / claim.job_id).mkdir(parents=True)
    queue.fail(claim, {"message": "not finite", "details": {"kept_attempt": claim.token}})
    housekeeping.after_attempt(claim)
    assert b"".join(artifacts.read(kept)) == b"bytes"


def test_job_of_another_version_does_not_stop_the_deletion_of_other_leftovers(
    housekeeping: Housekeeping, database: Database, queue: Queue, tmp_path: Path
) -> None:
    ids = [add_job(database) for _ in range(2)]
    directories = [tmp_path / "checkpoints" / job_id for job_id in ids]
    for directory in directories:
        directory.mkdir(parents=True)
    with database.write() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.id == ids[0]).values(spec={"adapter": {"method": "of later"}}))
    with database.write() as connection:
        for job_id in ids:
            request_cancel(connection, job_id, START)
    housekeeping.tick(preemptible=[])
    assert not any(directory.exists() for directory in directories)


def test_only_old_bytes_without_a_dataset_are_removed(
    housekeeping: Housekeeping, database: Database, artifacts: ArtifactStore, tmp_path: Path
) -> None:
    def kept() -> list[str]:
        return sorted(path.name[0] for path in (tmp_path / "artifacts" / "datasets").iterdir())

    def store(name: str, stored_at: float) -> None:
        artifacts.create(dataset_key(name * 64), b"rows")
        os.utime(tmp_path / "artifacts" / dataset_key(name * 64), (stored_at, stored_at))

    made_at = START.timestamp()
    for name, stored_at in (("0", made_at), ("a", made_at - 1), ("b", made_at + 1), ("c", time.time() - 23 * 3600)):
        store(name, stored_at)
    housekeeping.tick(preemptible=[])
    assert kept() == ["0", "a", "b", "c"]  # a database without datasets does not own this store
    job_id = add_job(database)  # with the dataset whose bytes are "0"
    restarted(housekeeping).tick(preemptible=[])
    assert kept() == ["0", "a", "c"]
    with database.write() as connection:
        mark_deleted(connection, get_job(connection, job_id).dataset_id, START)
    restarted(housekeeping).tick(preemptible=[])
    assert kept() == ["a", "c"]


def restarted(housekeeping: Housekeeping) -> Housekeeping:
    """The same object, made to reap in the next pass, as after a restart."""
    housekeeping._next_reap_at = 0.0
    return housekeeping


def test_leftovers_of_jobs_cancelled_between_attempts_are_reaped(
    housekeeping: Housekeeping, database: Database, queue: Queue, tmp_path: Path
) -> None:
    add_job(database)
    claim = claim_next(queue)
    scratch = tmp_path / "tmp" / claim.name
    checkpoints = tmp_path / "checkpoints" / claim.job_id
    for path in (scratch, checkpoints):
        path.mkdir(parents=True)
    queue.release(claim, "the worker was stopped")
    with database.write() as connection:
        request_cancel(connection, claim.job_id, START)
    foreign = tmp_path / "checkpoints" / "job_of_another_database"
    foreign.mkdir()
    housekeeping.tick(preemptible=[])
    assert not scratch.exists()
    assert not checkpoints.exists()
    assert foreign.exists()
