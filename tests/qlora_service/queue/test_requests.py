"""What users, and more urgent jobs, ask of jobs that are queued or run."""

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
    DISK_FULL,
    LEASE_S,
    VERBS,
    SteppedClock,
    add_job,
    ask,
    assert_history_is_legal,
    claim_next,
    job_events,
    job_of,
    status_history,
    stored_rows,
)

# --- cancelling


def test_cancelled_queued_job_ends_at_once_and_is_never_claimed(
    queue: Queue, database: Database, clock: SteppedClock
) -> None:
    job_id = add_job(database)
    clock.advance(1)
    job = ask(database, request_cancel, job_id, clock.now)
    assert (job.status, job.finished_at) == (JobStatus.CANCELLED, clock.now)
    assert queue.claim("host:1:0") is None
    assert status_history(database, job_id) == ["queued", "cancelled"]


def test_running_job_hears_of_the_cancel_at_its_next_sign_of_life(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    job = ask(database, request_cancel, job_id)
    assert (job.status, job.stop_request) == (JobStatus.RUNNING, StopRequest.CANCEL)
    assert queue.renew(claim) is StopRequest.CANCEL
    assert queue.report(claim, Progress(step=1)) is StopRequest.CANCEL
    queue.cancelled(claim)
    assert status_history(database, job_id) == ["queued", "running", "cancelled"]


def test_cancel_asked_twice_is_told_once(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    claim_next(queue)
    ask(database, request_cancel, job_id)
    before = stored_rows(database)
    assert ask(database, request_cancel, job_id).stop_request is StopRequest.CANCEL
    assert stored_rows(database) == before
    assert [event.data for event in job_events(database, job_id) if event.type == "log"] == [
        {"message": "cancel requested"}
    ]


def test_job_that_finishes_before_it_hears_of_the_cancel_has_succeeded(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    ask(database, request_cancel, job_id)
    queue.succeed(claim, {"attempt": 1})
    assert job_of(database, job_id).status is JobStatus.SUCCEEDED


@pytest.mark.parametrize("how", ["lost", "released"])
def test_job_to_be_cancelled_does_not_go_back_to_the_queue(
    queue: Queue, database: Database, clock: SteppedClock, how: str
) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    ask(database, request_cancel, job_id)
    if how == "lost":
        clock.advance(LEASE_S + 1)
        queue.requeue_lost()
    else:
        queue.release(claim, "the worker was stopped")
    assert job_of(database, job_id).finished_at == clock.now
    assert queue.claim("host:1:0") is None
    assert status_history(database, job_id) == ["queued", "running", "cancelled"]


def test_cancel_of_no_job_is_not_found(queue: Queue, database: Database) -> None:
    with pytest.raises(NotFound, match="job_none"):
        ask(database, request_cancel, "job_none")


def test_race_of_cancels_and_claims_leaves_every_job_with_one_story(database: Database) -> None:
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
        while (found := queue.claim("host:1:0")) is not None:
            claimed.append(found[0])

    def cancel_all(order: list[str]) -> Callable[[Queue, Database], Any]:
        return lambda queue, own: [ask(own, request_cancel, job_id) for job_id in order]

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


@pytest.mark.parametrize("verb", ["release", "died", "pause"])
def test_job_that_does_not_run_stands_where_its_checkpoint_is(queue: Queue, database: Database, verb: str) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    queue.report(claim, Progress(step=7, checkpoint_step=5))
    queue.report(claim, Progress(step=9))
    VERBS[verb](queue, claim)
    assert job_of(database, job_id).step == 5


# --- pausing


def test_paused_queued_job_waits_until_it_is_resumed(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    job = ask(database, request_pause, job_id)
    assert job.status is JobStatus.PAUSED
    assert job.hold is not None
    assert job.hold["reason"] == HoldReason.USER
    assert queue.claim("host:1:0") is None
    assert ask(database, request_resume, job_id).status is JobStatus.QUEUED
    assert claim_next(queue).job_id == job_id
    assert status_history(database, job_id) == ["queued", "paused", "queued", "running"]


def test_running_job_is_paused_at_its_step_boundary_and_goes_on_from_its_checkpoint(
    queue: Queue, database: Database
) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    queue.report(claim, Progress(step=9, checkpoint_step=9, plan={"threads": 1}))
    job = ask(database, request_pause, job_id)
    assert (job.status, job.stop_request) == (JobStatus.RUNNING, StopRequest.PAUSE)
    assert queue.renew(claim) is StopRequest.PAUSE
    queue.pause(claim, {"reason": HoldReason.USER, "message": "paused"})
    job = ask(database, request_resume, job_id)
    assert (job.status, job.hold, job.stop_request) == (JobStatus.QUEUED, None, None)
    claim_next(queue)
    job = job_of(database, job_id)
    assert (job.step, job.checkpoint_step, job.plan) == (9, 9, {"threads": 1})


def test_pause_can_be_taken_back_before_the_attempt_hears_of_it(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    ask(database, request_pause, job_id)
    assert ask(database, request_resume, job_id).stop_request is None
    assert queue.renew(claim) is None


def test_cancel_wins_over_pause_and_ends_a_paused_job(queue: Queue, database: Database) -> None:
    running, paused = add_job(database, priority=1), add_job(database)
    claim = claim_next(queue)
    ask(database, request_pause, running)
    assert ask(database, request_cancel, running).stop_request is StopRequest.CANCEL
    with pytest.raises(Conflict, match="being cancelled"):
        ask(database, request_pause, running)
    with pytest.raises(Conflict, match="being cancelled"):
        ask(database, request_resume, running)
    queue.pause(claim, DISK_FULL)
    assert job_of(database, running).status is JobStatus.CANCELLED
    ask(database, request_pause, paused)
    assert ask(database, request_cancel, paused).status is JobStatus.CANCELLED


@pytest.mark.parametrize("how", ["lost", "released", "died"])
def test_job_to_be_paused_does_not_go_back_to_the_queue(
    queue: Queue, database: Database, clock: SteppedClock, how: str
) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    ask(database, request_pause, job_id)
    if how == "lost":
        clock.advance(LEASE_S + 1)
        queue.requeue_lost()
    else:
        VERBS[{"released": "release", "died": "died"}[how]](queue, claim)
    assert job_of(database, job_id).status is JobStatus.PAUSED
    assert_history_is_legal(database, job_id)


@pytest.mark.parametrize("verb", ["succeed", "fail", "cancelled"])
def test_ended_job_is_neither_paused_nor_resumed(queue: Queue, database: Database, verb: str) -> None:
    job_id = add_job(database)
    VERBS[verb](queue, claim_next(queue))
    before = stored_rows(database)
    for request in (request_pause, request_resume):
        with pytest.raises(Conflict, match="nothing left to"):
            ask(database, request, job_id)
    assert stored_rows(database) == before


def test_requests_for_no_job_are_not_found(queue: Queue, database: Database) -> None:
    for request in (request_pause, request_resume):
        with pytest.raises(NotFound, match="job_none"):
            ask(database, request, "job_none")


def test_job_that_waits_for_room_is_resumed_when_there_is_enough(queue: Queue, database: Database) -> None:
    job_id, by_user = add_job(database, priority=1), add_job(database)
    queue.pause(claim_next(queue), DISK_FULL)
    ask(database, request_pause, by_user)
    assert job_of(database, job_id).hold == DISK_FULL
    assert queue.resume_held(999) == []
    assert queue.resume_held(1000) == [job_id]
    assert job_of(database, job_id).status is JobStatus.QUEUED
    assert job_of(database, by_user).status is JobStatus.PAUSED


def test_user_who_pauses_a_job_without_room_keeps_it_paused(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    queue.pause(claim_next(queue), DISK_FULL)
    for _ in range(2):
        hold = ask(database, request_pause, job_id).hold
        assert hold is not None
        assert hold["reason"] == HoldReason.USER
    assert queue.resume_held(10**12) == []
    assert status_history(database, job_id) == ["queued", "running", "paused"]
    assert [event.type for event in job_events(database, job_id)].count("log") == 1


# --- making room


def test_more_urgent_job_makes_the_least_urgent_running_one_stop(queue: Queue, database: Database) -> None:
    add_job(database, priority=2)
    add_job(database, priority=1)
    first, second = claim_next(queue, "a"), claim_next(queue, "b")
    assert queue.preempt(["a", "b"]) is None
    add_job(database, priority=1)
    assert queue.preempt(["a", "b"]) is None
    urgent = add_job(database, priority=9)
    assert queue.preempt(["c"]) is None
    assert queue.preempt(["a", "b"]) == second.job_id
    assert queue.preempt(["a", "b"]) is None  # one at a time
    assert (queue.renew(first), queue.renew(second)) == (None, StopRequest.PREEMPT)
    queue.release(second, "made room")
    assert claim_next(queue, "b").job_id == urgent
    job = job_of(database, second.job_id)
    assert (job.status, job.stop_request) == (JobStatus.QUEUED, None)


def test_urgent_job_of_a_project_at_its_limit_makes_one_of_its_own_stop(
    database: Database, clock: SteppedClock
) -> None:
    queue = Queue(database, lease_s=LEASE_S, clock=clock, leases=clock.lease_clock, max_running=1)
    add_job(database, project="other", priority=-1)
    own = add_job(database)
    claims = {claim.job_id: claim for claim in (claim_next(queue, "a"), claim_next(queue, "b"))}
    urgent = add_job(database, priority=10)
    assert queue.preempt(["a", "b"], slot_is_free=True) == own
    queue.release(claims[own], "made room")
    assert claim_next(queue, "a").job_id == urgent


def test_urgent_job_of_a_project_at_its_limit_stops_nobody_else(database: Database, clock: SteppedClock) -> None:
    queue = Queue(database, lease_s=LEASE_S, clock=clock, leases=clock.lease_clock, max_running=1)
    other = add_job(database, project="other")
    add_job(database, priority=10)
    claim_next(queue, "a"), claim_next(queue, "b")
    add_job(database, priority=10)
    assert queue.preempt(["a", "b"]) is None
    add_job(database, project="third", priority=5)
    assert queue.preempt(["a", "b"], slot_is_free=True) is None  # which it takes
    assert queue.preempt(["a", "b"]) == other


def test_preempted_job_is_next_among_its_equals(queue: Queue, database: Database, clock: SteppedClock) -> None:
    first = add_job(database)
    claim = claim_next(queue, "a")
    add_job(database)
    add_job(database, priority=1)
    queue.preempt(["a"])
    queue.release(claim, "made room")
    queue.succeed(claim_next(queue, "a"), {})
    assert claim_next(queue, "a").job_id == first


def test_youngest_of_the_least_urgent_jobs_makes_room(queue: Queue, database: Database) -> None:
    ids = sorted(add_job(database) for _ in range(3))
    for worker in "abc":
        claim_next(queue, worker)
    add_job(database, priority=1)
    assert queue.preempt(["a", "b", "c"]) == ids[-1]


def test_while_one_job_stops_no_other_is_asked_to(queue: Queue, database: Database) -> None:
    stopping = add_job(database, priority=1)
    add_job(database)
    claim_next(queue, "a")
    less_urgent = claim_next(queue, "b")
    ask(database, request_cancel, stopping)
    add_job(database, priority=9)
    assert queue.preempt(["a", "b"]) is None
    assert queue.renew(less_urgent) is None


def test_resuming_a_job_that_makes_room_keeps_nobody_waiting(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    claim = claim_next(queue, "a")
    add_job(database, priority=1)
    queue.preempt(["a"])
    ask(database, request_resume, job_id)
    assert queue.renew(claim) is StopRequest.PREEMPT


def test_job_that_is_paused_while_it_makes_room_stays_paused(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    claim = claim_next(queue, "a")
    add_job(database, priority=1)
    queue.preempt(["a"])
    ask(database, request_pause, job_id)
    assert queue.renew(claim) is StopRequest.PAUSE
    queue.release(claim, "made room")
    assert job_of(database, job_id).status is JobStatus.PAUSED
