"""Expired leases, dead attempts, and the requeueing of their jobs."""

from datetime import timedelta

import pytest

from qlora_service.domain.jobs import FailureReason, JobStatus
from qlora_service.queue.claim import Progress
from qlora_service.queue.queue import Queue
from qlora_service.queue.requests import request_cancel, request_pause
from qlora_service.store.database import Database
from tests.control_plane import (
    CLAIM_WRITES,
    LEASE_S,
    SteppedClock,
    add_job,
    assert_history_is_legal,
    claim_next,
    job_events,
    read_job,
    send_request,
)

# --- leases


def test_lease_holds_until_its_end_and_not_longer(queue: Queue, database: Database, clock: SteppedClock) -> None:
    job_id = add_job(database)
    claim_next(queue)
    clock.advance(LEASE_S)
    assert queue.requeue_lost() == []
    clock.advance(0.001)
    assert queue.requeue_lost() == [job_id]
    assert queue.requeue_lost() == []
    assert read_job(database, job_id).status is JobStatus.QUEUED
    assert job_events(database, job_id)[-1].data == {
        "status": "queued",
        "reason": "its worker did not renew the claim",
    }


@pytest.mark.parametrize("method", ["renew", "report"])
def test_heartbeat_and_report_extend_the_lease(
    queue: Queue, database: Database, clock: SteppedClock, method: str
) -> None:
    add_job(database)
    claim = claim_next(queue)
    for _ in range(4):
        clock.advance(LEASE_S - 1)
        assert CLAIM_WRITES[method](queue, claim) is None
        assert queue.requeue_lost() == []


def test_expired_claim_stays_valid_until_the_job_is_requeued(
    queue: Queue, database: Database, clock: SteppedClock
) -> None:
    add_job(database)
    claim = claim_next(queue)
    clock.advance(10 * LEASE_S)
    queue.renew(claim)
    assert queue.requeue_lost() == []


def test_only_lost_jobs_are_requeued(queue: Queue, database: Database, clock: SteppedClock) -> None:
    for _ in range(3):
        add_job(database)
    lost, alive = claim_next(queue), claim_next(queue)
    clock.advance(LEASE_S - 1)
    queue.renew(alive)
    clock.advance(2)
    assert queue.requeue_lost() == [lost.job_id]
    queue.succeed(alive, {})


# --- deaths


def test_third_death_without_progress_fails_the_job(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    for attempt in (1, 2):
        claim = claim_next(queue)
        assert queue.died(claim, {"message": f"cause {attempt}"}) is JobStatus.QUEUED
    claim = claim_next(queue)
    assert queue.died(claim, {"message": "cause 3"}) is JobStatus.FAILED
    job = read_job(database, job_id)
    assert job.error is not None
    assert job.error["details"]["reason"] == FailureReason.TRAINER_DIED
    assert [death["message"] for death in job.error["details"]["deaths"]] == ["cause 1", "cause 2", "cause 3"]
    for attempt in (1, 2, 3):
        assert f"attempt {attempt}: cause {attempt}" in job.error["message"]
    assert_history_is_legal(database, job_id)


def test_progress_between_deaths_resets_their_count(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    for step in range(1, 8):
        claim = claim_next(queue)
        queue.report(claim, Progress(step=step, checkpoint_step=step))
        queue.died(claim, {"message": "killed"})
    job = read_job(database, job_id)
    assert (job.status, job.attempt, len(job.deaths)) == (JobStatus.QUEUED, 7, 1)


def test_resuming_from_the_same_checkpoint_is_no_progress(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    queue.report(claim, Progress(checkpoint_step=5))
    queue.died(claim, {"message": "killed"})
    for _ in range(2):
        claim = claim_next(queue)
        queue.report(claim, Progress(step=5, checkpoint_step=5))
        queue.died(claim, {"message": "killed"})
    assert read_job(database, job_id).status is JobStatus.FAILED


def test_deaths_with_the_same_reason_fail_the_job_with_that_reason(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    for _ in range(3):
        queue.died(claim_next(queue), {"message": "host", "reason": FailureReason.HOST_OUT_OF_MEMORY})
    error = read_job(database, job_id).error
    assert error is not None
    assert error["details"]["reason"] == FailureReason.HOST_OUT_OF_MEMORY


def test_lost_leases_count_as_deaths(queue: Queue, database: Database, clock: SteppedClock) -> None:
    job_id = add_job(database)
    for _ in range(3):
        claim_next(queue)
        clock.advance(LEASE_S + 1)
        assert queue.requeue_lost() == [job_id]
    assert read_job(database, job_id).status is JobStatus.FAILED


@pytest.mark.parametrize("action", ["cancel", "pause"])
def test_third_death_of_a_job_with_a_stop_request_is_no_failure(queue: Queue, database: Database, action: str) -> None:
    job_id = add_job(database)
    for _ in range(2):
        queue.died(claim_next(queue), {"message": "killed"})
    claim = claim_next(queue)
    request, status = {
        "cancel": (request_cancel, JobStatus.CANCELLED),
        "pause": (request_pause, JobStatus.PAUSED),
    }[action]
    send_request(database, request, job_id)
    assert queue.died(claim, {"message": "killed"}) is status
    job = read_job(database, job_id)
    assert (job.status, job.error, len(job.deaths)) == (status, None, 3)


def test_release_by_a_stopped_worker_is_no_death(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    for _ in range(5):
        queue.release(claim_next(queue), "the worker was stopped")
    assert read_job(database, job_id).status is JobStatus.QUEUED


def test_jobs_of_a_dead_worker_are_requeued_at_once(queue: Queue, database: Database) -> None:
    add_job(database)
    claim = claim_next(queue)
    assert queue.requeue_of("another") == []
    assert queue.requeue_of("host:1:0") == [claim.job_id]


def test_claims_of_an_earlier_boot_are_lost(queue: Queue, database: Database, clock: SteppedClock) -> None:
    job_id = add_job(database)
    claim_next(queue)
    rebooted = Queue(database, lease_s=LEASE_S, clock=clock, leases=lambda _: ("rebooted", 0.0))
    assert rebooted.requeue_lost() == [job_id]


def test_jump_of_the_wall_clock_loses_no_claim(queue: Queue, database: Database, clock: SteppedClock) -> None:
    add_job(database)
    jumping = Queue(database, lease_s=LEASE_S, clock=lambda: clock.now + timedelta(days=400), leases=clock.lease_clock)
    claim_next(queue)
    assert jumping.requeue_lost() == []
