"""Bases requested for chats, and the workers that have them loaded, on both databases."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qlora_service.domain.jobs import JobStatus, StopRequest
from qlora_service.queue.claim import Claim, Progress
from qlora_service.queue.queue import Queue
from qlora_service.store import inference
from qlora_service.store.database import Database
from qlora_service.store.inference import REQUEST_LIFETIME_S, LoadedBase
from qlora_service.store.jobs import get_job
from tests.control_plane import SteppedClock, add_job, clock, each_database, job_events, queue

__all__ = ["clock", "each_database", "queue"]

SMALL, LARGE = LoadedBase("small", "{}"), LoadedBase("large", "{}")

RequestBase = Callable[[LoadedBase], None]


@pytest.fixture
def request_base(database: Database, clock: SteppedClock) -> RequestBase:
    def request(base: LoadedBase) -> None:
        with database.write() as connection:
            inference.request_base(connection, base, clock.lease_clock)

    return request


def wanted(database: Database, clock: SteppedClock, worker: str = "w") -> LoadedBase | None:
    with database.read() as connection:
        return inference.requested_base(connection, worker, clock.lease_clock)


def take(database: Database, base: LoadedBase, worker: str) -> bool:
    with database.write() as connection:
        return inference.assign_base(connection, base, worker, f"/{worker}.sock")


def socket_of(database: Database, base: LoadedBase) -> str | None:
    with database.read() as connection:
        return inference.socket_of(connection, base)


def test_a_base_is_wanted_while_its_request_is_renewed(
    database: Database, clock: SteppedClock, request_base: RequestBase
) -> None:
    assert wanted(database, clock) is None
    request_base(SMALL)
    assert wanted(database, clock) == SMALL
    clock.advance(REQUEST_LIFETIME_S - 1)
    request_base(SMALL)
    clock.advance(REQUEST_LIFETIME_S - 1)
    assert wanted(database, clock) == SMALL
    clock.advance(2)
    assert wanted(database, clock) is None


def test_a_base_taken_by_one_worker_is_not_wanted_by_others(
    database: Database, clock: SteppedClock, request_base: RequestBase
) -> None:
    request_base(SMALL)
    assert take(database, SMALL, "first")
    assert not take(database, SMALL, "second")
    assert socket_of(database, SMALL) == "/first.sock"
    assert wanted(database, clock, "second") is None
    with database.read() as connection:
        assert inference.another_is_loaded(connection, LARGE)
        assert not inference.another_is_loaded(connection, SMALL)
        assert not inference.another_is_requested(connection, clock.lease_clock)
    request_base(LARGE)
    with database.read() as connection:
        assert inference.another_is_requested(connection, clock.lease_clock)


@pytest.mark.parametrize("event", ["given up", "forgotten", "worker restarted"])
def test_a_base_that_its_worker_has_lost_is_wanted_again(
    database: Database, clock: SteppedClock, request_base: RequestBase, event: str
) -> None:
    request_base(SMALL)
    take(database, SMALL, "first")
    if event == "worker restarted":  # after a kill, with the row of its base still there
        assert wanted(database, clock, "first") == SMALL
        assert take(database, SMALL, "first")
        return
    with database.write() as connection:
        if event == "given up":
            inference.release_base(connection, "first")
        else:
            inference.forget_socket(connection, "/first.sock")
    assert socket_of(database, SMALL) is None
    assert wanted(database, clock, "second") == SMALL


def test_a_job_waits_if_it_can_be_claimed(database: Database, queue: Queue) -> None:
    def waits(max_running: int | None) -> bool:
        with database.read() as connection:
            return inference.job_waits(connection, max_running)

    assert not waits(None)
    add_job(database)
    assert waits(None)
    queue.claim("w")
    assert not waits(None)
    add_job(database)
    assert waits(None)
    assert not waits(1)  # its project is at its limit of running jobs
    assert waits(2)


def test_the_job_ahead_is_the_running_one_with_the_smallest_eta(database: Database, queue: Queue) -> None:
    def ahead() -> tuple[str, JobStatus, float | None] | None:
        with database.read() as connection:
            holder = inference.job_ahead(connection)
        return None if holder is None else (holder.id, holder.status, holder.eta_s)

    assert ahead() is None
    first, second, _ = (add_job(database) for _ in range(3))
    assert ahead() == (first, JobStatus.QUEUED, None)
    for _ in range(2):
        queue.claim("w")
    queue.report(Claim(second, 1), Progress(eta_s=10.0))
    assert ahead() == (second, JobStatus.RUNNING, 10.0)
    queue.report(Claim(first, 1), Progress(eta_s=5.0))
    assert ahead() == (first, JobStatus.RUNNING, 5.0)


def test_a_job_is_preempted_once_and_not_while_another_is_stopping(
    database: Database, queue: Queue, clock: SteppedClock
) -> None:
    def preempt(job_id: str, token: int = 1) -> bool:
        with database.write() as connection:
            return inference.request_preemption(connection, job_id, token, clock())

    first, second = add_job(database), add_job(database)
    assert not preempt(first)  # not running
    for _ in range(2):
        queue.claim("w")
    assert not preempt(first, token=2)
    assert preempt(first)
    assert not preempt(first)
    assert not preempt(second)
    with database.read() as connection:
        assert get_job(connection, first).stop_request is StopRequest.PREEMPT
        assert get_job(connection, second).stop_request is None
    assert "a chat is waiting: the job is preempted" in job_events(database, first)[-1].data["message"]
