"""Who waits for which base, on both databases."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qlora_service.domain.jobs import JobStatus, StopRequest
from qlora_service.queue.claim import Claim, Progress
from qlora_service.queue.queue import Queue
from qlora_service.store import inference
from qlora_service.store.database import Database
from qlora_service.store.inference import WANTED_S, LoadedBase
from qlora_service.store.jobs import get_job
from tests.control_plane import SteppedClock, add_job, clock, each_database, job_events, queue

__all__ = ["clock", "each_database", "queue"]

SMALL, LARGE = LoadedBase("small", "{}"), LoadedBase("large", "{}")


Ask = Callable[[LoadedBase], None]


@pytest.fixture
def ask(database: Database, clock: SteppedClock) -> Ask:
    def ask(base: LoadedBase) -> None:
        with database.write() as connection:
            inference.ask_for(connection, base, clock.lease_clock)

    return ask


def wanted(database: Database, clock: SteppedClock, worker: str = "w") -> LoadedBase | None:
    with database.read() as connection:
        return inference.wanted_base(connection, worker, clock.lease_clock)


def take(database: Database, base: LoadedBase, worker: str) -> bool:
    with database.write() as connection:
        return inference.take(connection, base, worker, f"/{worker}.sock")


def socket_of(database: Database, base: LoadedBase) -> str | None:
    with database.read() as connection:
        return inference.socket_of(connection, base)


def test_a_base_is_wanted_as_long_as_somebody_asks(database: Database, clock: SteppedClock, ask: Ask) -> None:
    assert wanted(database, clock) is None
    ask(SMALL)
    assert wanted(database, clock) == SMALL
    clock.advance(WANTED_S - 1)
    ask(SMALL)
    clock.advance(WANTED_S - 1)
    assert wanted(database, clock) == SMALL
    clock.advance(2)
    assert wanted(database, clock) is None


def test_one_worker_takes_a_base_and_the_others_see_that(database: Database, clock: SteppedClock, ask: Ask) -> None:
    ask(SMALL)
    assert take(database, SMALL, "first")
    assert not take(database, SMALL, "second")
    assert socket_of(database, SMALL) == "/first.sock"
    assert wanted(database, clock, "second") is None
    with database.read() as connection:
        assert inference.another_is_loaded(connection, LARGE)
        assert not inference.another_is_loaded(connection, SMALL)
        assert not inference.another_is_wanted(connection, clock.lease_clock)
    ask(LARGE)
    with database.read() as connection:
        assert inference.another_is_wanted(connection, clock.lease_clock)


@pytest.mark.parametrize("how", ["given up", "forgotten", "the worker is new"])
def test_what_a_worker_has_no_more_is_wanted_again(database: Database, clock: SteppedClock, ask: Ask, how: str) -> None:
    ask(SMALL)
    take(database, SMALL, "first")
    if how == "the worker is new":  # and finds what it had before it was killed
        assert wanted(database, clock, "first") == SMALL
        assert take(database, SMALL, "first")
        return
    with database.write() as connection:
        if how == "given up":
            inference.give_up(connection, "first")
        else:
            inference.forget(connection, "/first.sock")
    assert socket_of(database, SMALL) is None
    assert wanted(database, clock, "second") == SMALL


def test_a_job_waits_when_it_could_be_claimed(database: Database, queue: Queue) -> None:
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
    assert not waits(1)  # its project has as many running as it may
    assert waits(2)


def test_the_job_ahead_is_the_running_one_that_ends_first(database: Database, queue: Queue) -> None:
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


def test_a_job_is_asked_once_to_make_way_and_not_while_another_stops(
    database: Database, queue: Queue, clock: SteppedClock
) -> None:
    def ask(job_id: str, token: int = 1) -> bool:
        with database.write() as connection:
            return inference.ask_to_make_way(connection, job_id, token, clock())

    first, second = add_job(database), add_job(database)
    assert not ask(first)  # it does not run
    for _ in range(2):
        queue.claim("w")
    assert not ask(first, token=2)
    assert ask(first)
    assert not ask(first)
    assert not ask(second)
    with database.read() as connection:
        assert get_job(connection, first).stop_request is StopRequest.PREEMPT
        assert get_job(connection, second).stop_request is None
    assert "a chat is waiting: the job is preempted" in job_events(database, first)[-1].data["message"]
