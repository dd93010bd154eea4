from collections.abc import Callable

import pytest
import sqlalchemy as sa

from qlora_service.domain.jobs import FailureReason, JobStatus
from qlora_service.errors import ClaimLost, Conflict
from qlora_service.queue.claim import Claim, Progress
from qlora_service.queue.queue import Queue
from qlora_service.queue.requests import request_cancel
from qlora_service.store.database import Database
from qlora_service.store.tables import jobs
from tests.control_plane import (
    CLAIM_WRITES,
    ERROR,
    LEASE_S,
    START,
    SteppedClock,
    add_job,
    assert_history_is_legal,
    claim_next,
    job_events,
    read_job,
    run_in_processes,
    send_request,
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


def test_claim_records_worker_and_start(queue: Queue, database: Database, clock: SteppedClock) -> None:
    job_id = add_job(database)
    clock.advance(5)
    claimed = queue.claim("host:1:0")
    assert claimed is not None
    claim, job = claimed
    assert claim == Claim(job_id, 1)
    assert job == read_job(database, job_id)
    assert (job.status, job.attempt, job.phase, job.started_at) == (JobStatus.RUNNING, 1, "starting", clock.now)
    event = job_events(database, job_id)[-1]
    assert (event.type, event.at) == ("status", clock.now)
    assert event.data == {"status": "running", "attempt": 1, "worker": "host:1:0"}


def test_new_claim_resets_progress_but_keeps_the_first_start_time(
    queue: Queue, database: Database, clock: SteppedClock
) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    queue.report(claim, Progress(phase="training", step=9, total_steps=40, eta_s=1.5, metrics={"loss": 2.0}))
    queue.release(claim, "the worker was stopped")
    clock.advance(60)
    assert claim_next(queue) == Claim(job_id, 2)
    job = read_job(database, job_id)
    assert (job.step, job.total_steps, job.eta_s, job.metrics, job.phase) == (0, None, None, {}, "starting")
    assert job.started_at == START


@pytest.mark.slow
def test_six_processes_run_each_of_200_jobs_once(database: Database) -> None:
    ids = [add_job(database) for _ in range(200)]
    shares = run_in_processes(CLAIM_ALL, database.url, processes=6)
    assert sorted(job_id for share in shares for job_id in share) == sorted(ids)
    # Otherwise one process did all the work, and nothing was tested.
    assert sum(bool(share) for share in shares) > 1
    for job_id in ids:
        assert status_history(database, job_id) == ["queued", "running", "succeeded"]


@pytest.mark.slow
def test_concurrent_claims_all_get_a_job_while_there_are_enough(database: Database) -> None:
    ids = [add_job(database) for _ in range(120)]
    shares = run_in_processes(CLAIM_TWENTY, database.url, processes=6)
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


def test_report_stores_its_fields_and_leaves_the_others(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    queue.report(claim, Progress(phase="training", total_steps=40))
    queue.report(claim, Progress(step=3, eta_s=12.5, metrics={"loss": 2.5}), ("metrics", {"step": 3}))
    job = read_job(database, job_id)
    assert (job.phase, job.step, job.total_steps, job.eta_s) == ("training", 3, 40, 12.5)
    assert job.metrics == {"loss": 2.5}
    assert [(event.type, event.data) for event in job_events(database, job_id)[2:]] == [("metrics", {"step": 3})]


@pytest.mark.parametrize("method", OUTCOMES)
def test_attempt_ends_with_the_reported_outcome(
    queue: Queue, database: Database, clock: SteppedClock, method: str
) -> None:
    job_id = add_job(database)
    claim = claim_next(queue)
    clock.advance(3)
    CLAIM_WRITES[method](queue, claim)
    job = read_job(database, job_id)
    assert job.status is OUTCOMES[method]
    assert job.finished_at == (clock.now if job.status.terminal else None)
    assert job.result == ({"attempt": 1} if method == "succeed" else None)
    assert job.error == (ERROR if method == "fail" else None)
    assert job.phase is None
    event = job_events(database, job_id)[-1]
    assert (event.type, event.at, event.data["status"]) == ("status", clock.now, OUTCOMES[method])
    assert event.data.get("error") == job.error
    assert_history_is_legal(database, job_id)


def test_event_numbers_follow_the_order_of_events(queue: Queue, database: Database) -> None:
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


@pytest.mark.parametrize("method", ["claim", *sorted(CLAIM_WRITES.keys() - {"renew"})])
def test_write_is_rolled_back_when_its_event_cannot_be_stored(queue: Queue, database: Database, method: str) -> None:
    add_job(database)
    write: Callable[[], object] = lambda: queue.claim("host:1:0")  # noqa: E731
    if method != "claim":
        claim = claim_next(queue)
        write = lambda: CLAIM_WRITES[method](queue, claim)  # noqa: E731
    before = stored_rows(database)
    with database.write() as connection:
        connection.exec_driver_sql("ALTER TABLE events RENAME TO away")
    with pytest.raises(sa.exc.DBAPIError):
        write()
    with database.write() as connection:
        connection.exec_driver_sql("ALTER TABLE away RENAME TO events")
    assert stored_rows(database) == before
    write()  # the missing table was the only obstacle


def test_each_warning_is_added_once_with_an_event(queue: Queue, database: Database) -> None:
    job_id = add_job(database)
    queue.warn(claim_next(queue), ["a", "b", "a"])
    queue.requeue_of("host:1:0")
    queue.warn(claim_next(queue), ["c", "b"])
    assert read_job(database, job_id).warnings == ["a", "b", "c"]
    events = [event.data["message"] for event in job_events(database, job_id) if event.type == "warning"]
    assert events == ["a", "b", "c"]


# --- fencing: without a valid claim, nothing is written


def expired_claim(queue: Queue, clock: SteppedClock) -> Claim:
    claim = claim_next(queue)
    clock.advance(LEASE_S + 1)
    assert queue.requeue_lost() == [claim.job_id]
    return claim


def superseded_claim(queue: Queue, clock: SteppedClock) -> Claim:
    claim = expired_claim(queue, clock)
    assert claim_next(queue) == Claim(claim.job_id, claim.token + 1)
    return claim


def ended_claim(method: str) -> Callable[[Queue, SteppedClock], Claim]:
    def end(queue: Queue, clock: SteppedClock) -> Claim:
        claim = claim_next(queue)
        CLAIM_WRITES[method](queue, claim)
        return claim

    return end


def claim_of_a_job_that_a_newer_one_ended(queue: Queue, clock: SteppedClock) -> Claim:
    claim = expired_claim(queue, clock)
    queue.succeed(claim_next(queue), {"attempt": 2})
    return claim


def future_claim(queue: Queue, clock: SteppedClock) -> Claim:
    claim = claim_next(queue)
    return Claim(claim.job_id, claim.token + 1)


INVALID_CLAIMS: dict[str, Callable[[Queue, SteppedClock], Claim]] = {
    "lease expired and requeued": expired_claim,
    "claimed by another worker": superseded_claim,
    "another attempt succeeded": claim_of_a_job_that_a_newer_one_ended,
    "unused token": future_claim,
    "unknown job": lambda queue, clock: Claim("job_none", 1),
    **{f"own {method}": ended_claim(method) for method in OUTCOMES},
}


@pytest.mark.parametrize("method", CLAIM_WRITES)
@pytest.mark.parametrize("situation", INVALID_CLAIMS)
def test_write_with_an_invalid_claim_raises_and_changes_nothing(
    queue: Queue, database: Database, clock: SteppedClock, situation: str, method: str
) -> None:
    add_job(database)
    claim = INVALID_CLAIMS[situation](queue, clock)
    before = stored_rows(database)
    with pytest.raises(ClaimLost, match=claim.job_id):
        CLAIM_WRITES[method](queue, claim)
    assert stored_rows(database) == before


@pytest.mark.parametrize("method", ["succeed", "fail", "cancelled"])
def test_ended_job_is_never_claimed_requeued_or_cancelled(
    queue: Queue, database: Database, clock: SteppedClock, method: str
) -> None:
    job_id = add_job(database)
    CLAIM_WRITES[method](queue, claim_next(queue))
    before = stored_rows(database)
    clock.advance(10 * LEASE_S)
    assert queue.claim("host:1:0") is None
    assert queue.requeue_lost() == []
    if method == "cancelled":
        assert send_request(database, request_cancel, job_id).status is JobStatus.CANCELLED
    else:
        with pytest.raises(Conflict, match="nothing left to cancel"):
            send_request(database, request_cancel, job_id)
    assert stored_rows(database) == before


# --- quotas


@pytest.mark.slow
def test_concurrent_claims_run_no_more_jobs_than_allowed(database: Database) -> None:
    for _ in range(120):
        add_job(database)
    shares = run_in_processes(CLAIM_AND_COUNT, database.url, "2", processes=6)
    running = [count for share in shares for count in share]
    assert len(running) > 10
    assert max(running) <= 2


def test_claim_respects_the_limit_of_running_jobs_per_project(database: Database, clock: SteppedClock) -> None:
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
