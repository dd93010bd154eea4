"""Requests of users to cancel, pause and resume jobs, and preemption by jobs with a higher priority."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from qlora_service.domain.jobs import HoldReason, JobStatus, StopRequest
from qlora_service.errors import Conflict, NotFound
from qlora_service.queue.claim import Claim, Progress
from qlora_service.queue.queue import Queue
from qlora_service.queue.requests import request_cancel, request_pause, request_resume
from qlora_service.store.database import Database
from tests.control_plane import (
    CLAIM_WRITES,
    DISK_FULL,
    LEASE_S,
    SteppedClock,
    add_job,
    assert_history_is_legal,
    claim_next,
    job_events,
    read_job,
    send_request,
    status_history,
    stored_rows,
)

# --- cancelling


def test_cancelled_queued_job_ends_at_once_and_is_never_claimed(
    queue: Queue, database: Database, clock: SteppedClock
) -> None:
    job_id = add_job(database)
    clock.advance(1)
    job = send_request(database, request_cancel, job_id, clock.now)
    assert (job.status, job.finished_at) == (JobStatus.CANCELLED, clock.now)
    assert queue.claim("host:1:0") is None
    assert status_history(database, job_id) == ["queued", "cancelled"]


def test_running_attempt_receives_the_cancel_with_its_next_write(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    job = send_request(database, request_cancel, job_id)
    assert (job.status, job.stop_request) == (JobStatus.RUNNING, StopRequest.CANCEL)
    assert queue.renew(claim) is StopRequest.CANCEL
    assert queue.report(claim, Progress(step=1)) is StopRequest.CANCEL
    queue.cancelled(claim)
    assert status_history(database, job_id) == ["queued", "running", "cancelled"]


def test_second_cancel_adds_no_event(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    claim_next(queue)
    send_request(database, request_cancel, job_id)
    before = stored_rows(database)
    assert send_request(database, request_cancel, job_id).stop_request is StopRequest.CANCEL
    assert stored_rows(database) == before
    assert [event.data for event in job_events(database, job_id) if event.type == "log"] == [
        {"message": "cancel requested"}
    ]


def test_job_that_ends_before_it_receives_the_cancel_has_succeeded(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    send_request(database, request_cancel, job_id)
    queue.succeed(claim, {"attempt": 1})
    assert read_job(database, job_id).status is JobStatus.SUCCEEDED


@pytest.mark.parametrize("how", ["lost", "released"])
def test_job_with_a_cancel_request_is_not_requeued(
    queue: Queue, database: Database, clock: SteppedClock, how: str
) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    send_request(database, request_cancel, job_id)
    if how == "lost":
        clock.advance(LEASE_S + 1)
        queue.requeue_lost()
    else:
        queue.release(claim, "the worker was stopped")
    assert read_job(database, job_id).finished_at == clock.now
    assert queue.claim("host:1:0") is None
    assert status_history(database, job_id) == ["queued", "running", "cancelled"]


def test_cancel_of_no_job_is_not_found(queue: Queue, database: Database) -> None:
    with pytest.raises(NotFound, match="job_none"):
        send_request(database, request_cancel, "job_none")


def test_concurrent_cancels_and_claims_leave_each_job_with_one_history(database: Database) -> None:
    ids = [add_job(database) for _ in range(60)]
    start = threading.Barrier(3)
    claimed: list[Claim] = []

    def with_own_connections(work: Callable[[Queue, Database], Any]) -> threading.Thread:
        def run() -> None:
            own = Database(database.url)
            start.wait()
            work(Queue(own, lease_s=LEASE_S), own)
            own.close()

        return threading.Thread(target=run)

    def claim_all(queue: Queue, _own: Database) -> None:
        while (result := queue.claim("host:1:0")) is not None:
            claimed.append(result[0])

    def cancel_all(order: list[str]) -> Callable[[Queue, Database], Any]:
        return lambda queue, own: [send_request(own, request_cancel, job_id) for job_id in order]

    threads = [with_own_connections(work) for work in (claim_all, cancel_all(ids), cancel_all(ids[::-1]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue = Queue(database, lease_s=LEASE_S)
    for claim in claimed:
        assert queue.renew(claim) is StopRequest.CANCEL
        queue.cancelled(claim)
    for job_id in ids:
        was_claimed = Claim(job_id, 1) in claimed
        assert status_history(database, job_id) == ["queued", *(["running"] if was_claimed else []), "cancelled"]


@pytest.mark.parametrize("method", ["release", "died", "pause"])
def test_step_of_a_job_that_does_not_run_is_that_of_its_checkpoint(
    queue: Queue, database: Database, method: str
) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    queue.report(claim, Progress(step=7, checkpoint_step=5))
    queue.report(claim, Progress(step=9))
    CLAIM_WRITES[method](queue, claim)
    assert read_job(database, job_id).step == 5


# --- pausing


def test_paused_queued_job_waits_until_it_is_resumed(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    job = send_request(database, request_pause, job_id)
    assert job.status is JobStatus.PAUSED
    assert job.hold is not None
    assert job.hold["reason"] == HoldReason.USER
    assert queue.claim("host:1:0") is None
    assert send_request(database, request_resume, job_id).status is JobStatus.QUEUED
    assert claim_next(queue).job_id == job_id
    assert status_history(database, job_id) == ["queued", "paused", "queued", "running"]


def test_running_job_is_paused_by_its_attempt_and_resumes_from_its_checkpoint(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    queue.report(claim, Progress(step=9, checkpoint_step=9, plan={"threads": 1}))
    job = send_request(database, request_pause, job_id)
    assert (job.status, job.stop_request) == (JobStatus.RUNNING, StopRequest.PAUSE)
    assert queue.renew(claim) is StopRequest.PAUSE
    queue.pause(claim, {"reason": HoldReason.USER, "message": "paused"})
    job = send_request(database, request_resume, job_id)
    assert (job.status, job.hold, job.stop_request) == (JobStatus.QUEUED, None, None)
    claim_next(queue)
    job = read_job(database, job_id)
    assert (job.step, job.checkpoint_step, job.plan) == (9, 9, {"threads": 1})


def test_resume_withdraws_a_pause_that_the_attempt_has_not_received(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    send_request(database, request_pause, job_id)
    assert send_request(database, request_resume, job_id).stop_request is None
    assert queue.renew(claim) is None


def test_cancel_overrides_pause_and_ends_a_paused_job(queue: Queue, database: Database) -> None:
    running, paused = add_job(database, priority=1), add_job(database)
    claim = claim_next(queue)
    send_request(database, request_pause, running)
    assert send_request(database, request_cancel, running).stop_request is StopRequest.CANCEL
    with pytest.raises(Conflict, match="being cancelled"):
        send_request(database, request_pause, running)
    with pytest.raises(Conflict, match="being cancelled"):
        send_request(database, request_resume, running)
    queue.pause(claim, DISK_FULL)
    assert read_job(database, running).status is JobStatus.CANCELLED
    send_request(database, request_pause, paused)
    assert send_request(database, request_cancel, paused).status is JobStatus.CANCELLED


@pytest.mark.parametrize("how", ["lost", "released", "died"])
def test_job_with_a_pause_request_is_not_requeued(
    queue: Queue, database: Database, clock: SteppedClock, how: str
) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    send_request(database, request_pause, job_id)
    if how == "lost":
        clock.advance(LEASE_S + 1)
        queue.requeue_lost()
    else:
        CLAIM_WRITES[{"released": "release", "died": "died"}[how]](queue, claim)
    assert read_job(database, job_id).status is JobStatus.PAUSED
    assert_history_is_legal(database, job_id)


@pytest.mark.parametrize("method", ["succeed", "fail", "cancelled"])
def test_ended_job_is_neither_paused_nor_resumed(queue: Queue, database: Database, method: str) -> None:
    job_id = add_job(database)
    CLAIM_WRITES[method](queue, claim_next(queue))
    before = stored_rows(database)
    for request in (request_pause, request_resume):
        with pytest.raises(Conflict, match="nothing left to"):
            send_request(database, request, job_id)
    assert stored_rows(database) == before


def test_requests_for_no_job_are_not_found(queue: Queue, database: Database) -> None:
    for request in (request_pause, request_resume):
        with pytest.raises(NotFound, match="job_none"):
            send_request(database, request, "job_none")


def test_job_held_by_a_full_disk_is_resumed_when_there_is_room(queue: Queue, database: Database) -> None:
    job_id, by_user = add_job(database, priority=1), add_job(database)
    queue.pause(claim_next(queue), DISK_FULL)
    send_request(database, request_pause, by_user)
    assert read_job(database, job_id).hold == DISK_FULL
    assert queue.resume_held(999) == []
    assert queue.resume_held(1000) == [job_id]
    assert read_job(database, job_id).status is JobStatus.QUEUED
    assert read_job(database, by_user).status is JobStatus.PAUSED


def test_job_held_by_a_full_disk_and_paused_by_the_user_stays_paused(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    queue.pause(claim_next(queue), DISK_FULL)
    for _ in range(2):
        hold = send_request(database, request_pause, job_id).hold
        assert hold is not None
        assert hold["reason"] == HoldReason.USER
    assert queue.resume_held(10**12) == []
    assert status_history(database, job_id) == ["queued", "running", "paused"]
    assert [event.type for event in job_events(database, job_id)].count("log") == 1


# --- preemption


def test_job_with_the_lowest_priority_is_preempted(queue: Queue, database: Database) -> None:
    add_job(database, priority=2)
    add_job(database, priority=1)
    first, second = claim_next(queue, "a"), claim_next(queue, "b")
    assert queue.preempt(["a", "b"]) is None
    add_job(database, priority=1)
    assert queue.preempt(["a", "b"]) is None
    higher = add_job(database, priority=9)
    assert queue.preempt(["c"]) is None
    assert queue.preempt(["a", "b"]) == second.job_id
    assert queue.preempt(["a", "b"]) is None  # one at a time
    assert (queue.renew(first), queue.renew(second)) == (None, StopRequest.PREEMPT)
    queue.release(second, "preempted")
    assert claim_next(queue, "b").job_id == higher
    job = read_job(database, second.job_id)
    assert (job.status, job.stop_request) == (JobStatus.QUEUED, None)


def test_job_of_a_project_at_its_limit_preempts_a_job_of_that_project(database: Database, clock: SteppedClock) -> None:
    queue = Queue(database, lease_s=LEASE_S, clock=clock, leases=clock.lease_clock, max_running=1)
    add_job(database, project="other", priority=-1)
    own = add_job(database)
    claims = {claim.job_id: claim for claim in (claim_next(queue, "a"), claim_next(queue, "b"))}
    higher = add_job(database, priority=10)
    assert queue.preempt(["a", "b"], slot_is_free=True) == own
    queue.release(claims[own], "preempted")
    assert claim_next(queue, "a").job_id == higher


def test_job_of_a_project_at_its_limit_preempts_no_other_project(database: Database, clock: SteppedClock) -> None:
    queue = Queue(database, lease_s=LEASE_S, clock=clock, leases=clock.lease_clock, max_running=1)
    other = add_job(database, project="other")
    add_job(database, priority=10)
    claim_next(queue, "a"), claim_next(queue, "b")
    add_job(database, priority=10)
    assert queue.preempt(["a", "b"]) is None
    add_job(database, project="third", priority=5)
    assert queue.preempt(["a", "b"], slot_is_free=True) is None  # the third project's job takes the free slot
    assert queue.preempt(["a", "b"]) == other


def test_preempted_job_is_next_of_its_priority(queue: Queue, database: Database, clock: SteppedClock) -> None:
    first = add_job(database)
    claim = claim_next(queue, "a")
    add_job(database)
    add_job(database, priority=1)
    queue.preempt(["a"])
    queue.release(claim, "preempted")
    queue.succeed(claim_next(queue, "a"), {})
    assert claim_next(queue, "a").job_id == first


def test_youngest_job_of_the_lowest_priority_is_preempted(queue: Queue, database: Database) -> None:
    ids = sorted(add_job(database) for _ in range(3))
    for worker in "abc":
        claim_next(queue, worker)
    add_job(database, priority=1)
    assert queue.preempt(["a", "b", "c"]) == ids[-1]


def test_no_job_is_preempted_while_another_is_stopping(queue: Queue, database: Database) -> None:
    stopping = add_job(database, priority=1)
    add_job(database)
    claim_next(queue, "a")
    other = claim_next(queue, "b")
    send_request(database, request_cancel, stopping)
    add_job(database, priority=9)
    assert queue.preempt(["a", "b"]) is None
    assert queue.renew(other) is None


def test_resume_does_not_withdraw_a_preemption(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    claim = claim_next(queue, "a")
    add_job(database, priority=1)
    queue.preempt(["a"])
    send_request(database, request_resume, job_id)
    assert queue.renew(claim) is StopRequest.PREEMPT


def test_job_paused_while_it_is_preempted_stays_paused(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    claim = claim_next(queue, "a")
    add_job(database, priority=1)
    queue.preempt(["a"])
    send_request(database, request_pause, job_id)
    assert queue.renew(claim) is StopRequest.PAUSE
    queue.release(claim, "preempted")
    assert read_job(database, job_id).status is JobStatus.PAUSED
