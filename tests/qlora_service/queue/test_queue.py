from collections.abc import Callable
from datetime import timedelta

import pytest
import sqlalchemy as sa

from qlora_service.domain.jobs import FailureReason, JobStatus
from qlora_service.errors import ClaimLost, Conflict
from qlora_service.queue.claim import Claim, Progress
from qlora_service.queue.queue import Queue
from qlora_service.queue.requests import request_cancel, request_pause
from qlora_service.store.database import Database
from qlora_service.store.tables import jobs
from tests.control_plane import (
    ERROR,
    LEASE_S,
    START,
    VERBS,
    SteppedClock,
    add_job,
    ask,
    assert_history_is_legal,
    claim_next,
    job_events,
    job_of,
    run_together,
    status_history,
    stored_rows,
)

OUTCOMES = {
    "succeed": JobStatus.SUCCEEDED,
    "fail": JobStatus.FAILED,
    "cancelled": JobStatus.CANCELLED,
    "release": JobStatus.QUEUED,
    "pause": JobStatus.PAUSED,
    "died": JobStatus.QUEUED,
}

CLAIM_ALL = """
from qlora_service.queue.queue import Queue
from qlora_service.queue.claim import Progress
from qlora_service.store.database import Database

def work(url):
    queue = Queue(Database(url), lease_s=600)
    done = []
    while claimed := queue.claim("worker"):
        claim, job = claimed
        queue.report(claim, Progress(step=1), ("metrics", {"attempt": claim.token}))
        queue.succeed(claim, {"attempt": claim.token})
        done.append(claim.job_id)
    return done
"""

CLAIM_TWENTY = """
from qlora_service.queue.queue import Queue
from qlora_service.store.database import Database

def work(url):
    queue = Queue(Database(url), lease_s=600)
    claims = [queue.claim("worker") for _ in range(20)]
    return [claimed and claimed[0].job_id for claimed in claims]
"""

CLAIM_AND_COUNT = """
from qlora_service.queue.queue import Queue
from qlora_service.store.database import Database

def work(url, max_running):
    database = Database(url)
    queue = Queue(database, lease_s=600, max_running=int(max_running))
    running, seen = "SELECT count(*) FROM jobs WHERE status = 'running'", []
    for _ in range(20):
        if claimed := queue.claim("worker"):
            with database.read() as connection:
                seen.append(connection.exec_driver_sql(running).scalar_one())
            queue.succeed(claimed[0], {})
    return seen
"""


# --- claiming


def test_claim_of_an_empty_queue_is_none(queue: Queue) -> None:
    assert queue.claim("host:1:0") is None


def test_claim_takes_the_highest_priority_then_the_oldest(queue: Queue, database: Database) -> None:
    ids = [add_job(database, priority=priority) for priority in (0, 5, -1)]
    # Ids of one millisecond are in no order among themselves.
    middle = sorted(add_job(database, priority=0) for _ in range(3))
    order = [claim_next(queue).job_id for _ in range(6)]
    assert order[0] == ids[1]
    assert order[1:5] == sorted([ids[0], *middle])
    assert order[5] == ids[2]


def test_claim_says_who_runs_the_job_since_when(queue: Queue, database: Database, clock: SteppedClock) -> None:
    job_id = add_job(database)
    clock.advance(5)
    claimed = queue.claim("host:1:0")
    assert claimed is not None
    claim, job = claimed
    assert claim == Claim(job_id, 1)
    assert job == job_of(database, job_id)
    assert (job.status, job.attempt, job.phase, job.started_at) == (JobStatus.RUNNING, 1, "starting", clock.now)
    event = job_events(database, job_id)[-1]
    assert (event.type, event.at) == ("status", clock.now)
    assert event.data == {"status": "running", "attempt": 1, "worker": "host:1:0"}


def test_new_claim_starts_from_nothing_but_keeps_the_first_start(
    queue: Queue, database: Database, clock: SteppedClock
) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    queue.report(claim, Progress(phase="training", step=9, total_steps=40, eta_s=1.5, metrics={"loss": 2.0}))
    queue.release(claim, "the worker was stopped")
    clock.advance(60)
    assert claim_next(queue) == Claim(job_id, 2)
    job = job_of(database, job_id)
    assert (job.step, job.total_steps, job.eta_s, job.metrics, job.phase) == (0, None, None, {}, "starting")
    assert job.started_at == START


def test_six_processes_run_each_of_200_jobs_once(database: Database) -> None:
    ids = [add_job(database) for _ in range(200)]
    shares = run_together(CLAIM_ALL, database.url, processes=6)
    assert sorted(job_id for share in shares for job_id in share) == sorted(ids)
    # One process doing all the work would prove nothing.
    assert sum(bool(share) for share in shares) > 1
    for job_id in ids:
        assert status_history(database, job_id) == ["queued", "running", "succeeded"]


def test_processes_that_claim_at_once_find_a_job_each_while_there_are_enough(database: Database) -> None:
    ids = [add_job(database) for _ in range(120)]
    shares = run_together(CLAIM_TWENTY, database.url, processes=6)
    assert sorted(job_id for share in shares for job_id in share) == sorted(ids)


def test_job_whose_configuration_cannot_be_read_fails_and_the_next_one_is_claimed(
    queue: Queue, database: Database
) -> None:
    unreadable, next_job = add_job(database, priority=1), add_job(database)
    with database.write() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.id == unreadable).values(spec={"of": "another version"}))
    assert queue.claim("host:1:0") is None
    assert claim_next(queue).job_id == next_job
    assert status_history(database, unreadable) == ["queued", "failed"]
    error = job_events(database, unreadable)[-1].data["error"]
    assert error["details"]["reason"] == FailureReason.INVALID_INPUT
    assert unreadable in error["message"]
    assert "post it again" in error["message"]


# --- a running attempt


def test_report_stores_what_it_has_and_leaves_the_rest(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    queue.report(claim, Progress(phase="training", total_steps=40))
    queue.report(claim, Progress(step=3, eta_s=12.5, metrics={"loss": 2.5}), ("metrics", {"step": 3}))
    job = job_of(database, job_id)
    assert (job.phase, job.step, job.total_steps, job.eta_s) == ("training", 3, 40, 12.5)
    assert job.metrics == {"loss": 2.5}
    assert [(event.type, event.data) for event in job_events(database, job_id)[2:]] == [("metrics", {"step": 3})]


@pytest.mark.parametrize("verb", OUTCOMES)
def test_attempt_ends_as_it_says(queue: Queue, database: Database, clock: SteppedClock, verb: str) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    clock.advance(3)
    VERBS[verb](queue, claim)
    job = job_of(database, job_id)
    assert job.status is OUTCOMES[verb]
    assert job.finished_at == (clock.now if job.status.terminal else None)
    assert job.result == ({"attempt": 1} if verb == "succeed" else None)
    assert job.error == (ERROR if verb == "fail" else None)
    assert job.phase is None
    event = job_events(database, job_id)[-1]
    assert (event.type, event.at, event.data["status"]) == ("status", clock.now, OUTCOMES[verb])
    assert event.data.get("error") == job.error
    assert_history_is_legal(database, job_id)


def test_events_are_numbered_in_the_order_things_happened(queue: Queue, database: Database) -> None:
    ids = [add_job(database), add_job(database)]
    claims = [claim_next(queue), claim_next(queue)]
    for step in range(1, 4):
        for claim in claims:
            queue.report(claim, Progress(step=step), ("metrics", {"step": step}))
    for claim in claims:
        queue.succeed(claim, {})
    for job_id in ids:
        events = job_events(database, job_id)
        numbers = [event.seq for event in events]
        assert numbers == sorted(set(numbers))
        steps = [event.data["step"] for event in events if event.type == "metrics"]
        assert steps == [1, 2, 3]
        assert [event.type for event in events] == ["status", "status", "metrics", "metrics", "metrics", "status"]


@pytest.mark.parametrize("verb", ["claim", *sorted(VERBS.keys() - {"renew"})])
def test_what_cannot_be_told_as_an_event_has_not_happened(queue: Queue, database: Database, verb: str) -> None:
    add_job(database)
    act: Callable[[], object] = lambda: queue.claim("host:1:0")  # noqa: E731
    if verb != "claim":
        claim = claim_next(queue)
        act = lambda: VERBS[verb](queue, claim)  # noqa: E731
    before = stored_rows(database)
    with database.write() as connection:
        connection.exec_driver_sql("ALTER TABLE events RENAME TO away")
    with pytest.raises(sa.exc.DBAPIError):
        act()
    with database.write() as connection:
        connection.exec_driver_sql("ALTER TABLE away RENAME TO events")
    assert stored_rows(database) == before
    act()  # it was only that


# --- fencing: who has no claim writes nothing


def zombie_after_lease_expiry(queue: Queue, clock: SteppedClock) -> Claim:
    claim = claim_next(queue)
    clock.advance(LEASE_S + 1)
    assert queue.requeue_lost() == [claim.job_id]
    return claim


def zombie_after_new_claim(queue: Queue, clock: SteppedClock) -> Claim:
    claim = zombie_after_lease_expiry(queue, clock)
    assert claim_next(queue) == Claim(claim.job_id, claim.token + 1)
    return claim


def ended(verb: str) -> Callable[[Queue, SteppedClock], Claim]:
    def end(queue: Queue, clock: SteppedClock) -> Claim:
        claim = claim_next(queue)
        VERBS[verb](queue, claim)
        return claim

    return end


def succeeded_by_a_newer_claim(queue: Queue, clock: SteppedClock) -> Claim:
    claim = zombie_after_lease_expiry(queue, clock)
    queue.succeed(claim_next(queue), {"attempt": 2})
    return claim


def future_claim(queue: Queue, clock: SteppedClock) -> Claim:
    claim = claim_next(queue)
    return Claim(claim.job_id, claim.token + 1)


WITHOUT_A_CLAIM: dict[str, Callable[[Queue, SteppedClock], Claim]] = {
    "lease expired and requeued": zombie_after_lease_expiry,
    "claimed anew by another": zombie_after_new_claim,
    "another succeeded": succeeded_by_a_newer_claim,
    "token of no claim": future_claim,
    "job of no row": lambda queue, clock: Claim("job_none", 1),
    **{f"own {verb}": ended(verb) for verb in OUTCOMES},
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("situation", WITHOUT_A_CLAIM)
def test_write_without_a_claim_raises_and_changes_nothing(
    queue: Queue, database: Database, clock: SteppedClock, situation: str, verb: str
) -> None:
    add_job(database)
    claim = WITHOUT_A_CLAIM[situation](queue, clock)
    before = stored_rows(database)
    with pytest.raises(ClaimLost, match=claim.job_id):
        VERBS[verb](queue, claim)
    assert stored_rows(database) == before


@pytest.mark.parametrize("verb", ["succeed", "fail", "cancelled"])
def test_ended_job_is_never_claimed_requeued_or_cancelled(
    queue: Queue, database: Database, clock: SteppedClock, verb: str
) -> None:
    job_id = add_job(database)
    VERBS[verb](queue, claim_next(queue))
    before = stored_rows(database)
    clock.advance(10 * LEASE_S)
    assert queue.claim("host:1:0") is None
    assert queue.requeue_lost() == []
    if verb == "cancelled":
        assert ask(database, request_cancel, job_id).status is JobStatus.CANCELLED
    else:
        with pytest.raises(Conflict, match="nothing left to cancel"):
            ask(database, request_cancel, job_id)
    assert stored_rows(database) == before


# --- leases


def test_lease_holds_until_its_end_and_not_longer(queue: Queue, database: Database, clock: SteppedClock) -> None:
    job_id = add_job(database)
    claim_next(queue)
    clock.advance(LEASE_S)
    assert queue.requeue_lost() == []
    clock.advance(0.001)
    assert queue.requeue_lost() == [job_id]
    assert queue.requeue_lost() == []
    assert job_of(database, job_id).status is JobStatus.QUEUED
    assert job_events(database, job_id)[-1].data == {
        "status": "queued",
        "reason": "its worker did not renew the claim",
    }


@pytest.mark.parametrize("verb", ["renew", "report"])
def test_sign_of_life_extends_the_lease(queue: Queue, database: Database, clock: SteppedClock, verb: str) -> None:
    add_job(database)
    claim = claim_next(queue)
    for _ in range(4):
        clock.advance(LEASE_S - 1)
        assert VERBS[verb](queue, claim) is None
        assert queue.requeue_lost() == []


def test_late_worker_keeps_a_job_that_nobody_requeued(queue: Queue, database: Database, clock: SteppedClock) -> None:
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


def test_death_is_followed_by_another_attempt_until_the_third_without_progress(
    queue: Queue, database: Database
) -> None:
    job_id = add_job(database)
    for attempt in (1, 2):
        claim = claim_next(queue)
        assert queue.died(claim, {"message": f"cause {attempt}"}) is JobStatus.QUEUED
    claim = claim_next(queue)
    assert queue.died(claim, {"message": "cause 3"}) is JobStatus.FAILED
    job = job_of(database, job_id)
    assert job.error is not None
    assert job.error["details"]["reason"] == FailureReason.TRAINER_DIED
    assert [death["message"] for death in job.error["details"]["deaths"]] == ["cause 1", "cause 2", "cause 3"]
    for attempt in (1, 2, 3):
        assert f"attempt {attempt}: cause {attempt}" in job.error["message"]
    assert_history_is_legal(database, job_id)


def test_progress_between_deaths_starts_the_count_anew(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    for step in range(1, 8):
        claim = claim_next(queue)
        queue.report(claim, Progress(step=step, checkpoint_step=step))
        queue.died(claim, {"message": "killed"})
    job = job_of(database, job_id)
    assert (job.status, job.attempt, len(job.deaths)) == (JobStatus.QUEUED, 7, 1)


def test_going_on_from_the_same_checkpoint_is_no_progress(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    queue.report(claim, Progress(checkpoint_step=5))
    queue.died(claim, {"message": "killed"})
    for _ in range(2):
        claim = claim_next(queue)
        queue.report(claim, Progress(step=5, checkpoint_step=5))
        queue.died(claim, {"message": "killed"})
    assert job_of(database, job_id).status is JobStatus.FAILED


def test_deaths_of_one_kind_fail_the_job_with_that_reason(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    for _ in range(3):
        queue.died(claim_next(queue), {"message": "host", "reason": FailureReason.HOST_OUT_OF_MEMORY})
    error = job_of(database, job_id).error
    assert error is not None
    assert error["details"]["reason"] == FailureReason.HOST_OUT_OF_MEMORY


def test_lost_leases_count_as_deaths(queue: Queue, database: Database, clock: SteppedClock) -> None:
    job_id = add_job(database)
    for _ in range(3):
        claim_next(queue)
        clock.advance(LEASE_S + 1)
        assert queue.requeue_lost() == [job_id]
    assert job_of(database, job_id).status is JobStatus.FAILED


@pytest.mark.parametrize("wish", ["cancel", "pause"])
def test_third_death_of_a_job_whose_user_stops_it_is_no_failure(queue: Queue, database: Database, wish: str) -> None:
    job_id = add_job(database)
    for _ in range(2):
        queue.died(claim_next(queue), {"message": "killed"})
    claim = claim_next(queue)
    request, status = {
        "cancel": (request_cancel, JobStatus.CANCELLED),
        "pause": (request_pause, JobStatus.PAUSED),
    }[wish]
    ask(database, request, job_id)
    assert queue.died(claim, {"message": "killed"}) is status
    job = job_of(database, job_id)
    assert (job.status, job.error, len(job.deaths)) == (status, None, 3)


def test_a_stopped_worker_is_no_death(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    for _ in range(5):
        queue.release(claim_next(queue), "the worker was stopped")
    assert job_of(database, job_id).status is JobStatus.QUEUED


def test_jobs_of_a_worker_that_is_gone_are_requeued_at_once(queue: Queue, database: Database) -> None:
    add_job(database)
    mine = claim_next(queue)
    assert queue.requeue_of("another") == []
    assert queue.requeue_of("host:1:0") == [mine.job_id]


def test_claims_of_another_boot_are_lost_whatever_their_time(
    queue: Queue, database: Database, clock: SteppedClock
) -> None:
    job_id = add_job(database)
    claim_next(queue)
    rebooted = Queue(database, lease_s=LEASE_S, clock=clock, leases=lambda _: ("rebooted", 0.0))
    assert rebooted.requeue_lost() == [job_id]


def test_a_wall_clock_that_jumps_loses_no_claim(queue: Queue, database: Database, clock: SteppedClock) -> None:
    add_job(database)
    jumping = Queue(database, lease_s=LEASE_S, clock=lambda: clock.now + timedelta(days=400), leases=clock.lease_clock)
    claim_next(queue)
    assert jumping.requeue_lost() == []


# --- quotas


def test_processes_that_claim_at_once_run_no_more_jobs_than_allowed(database: Database) -> None:
    for _ in range(120):
        add_job(database)
    shares = run_together(CLAIM_AND_COUNT, database.url, "2", processes=6)
    running = [count for share in shares for count in share]
    assert len(running) > 10
    assert max(running) <= 2


def test_project_runs_no_more_jobs_at_a_time_than_allowed(database: Database, clock: SteppedClock) -> None:
    queue = Queue(database, lease_s=LEASE_S, clock=clock, leases=clock.lease_clock, max_running=2)
    for _ in range(3):
        add_job(database)
    other = add_job(database, priority=-1)
    with database.write() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.id == other).values(project="other"))
    claims = [claim_next(queue) for _ in range(3)]
    assert claims[2].job_id == other
    assert queue.claim("host:1:0") is None
    queue.succeed(claims[0], {})
    assert claim_next(queue).job_id not in {claim.job_id for claim in claims}
