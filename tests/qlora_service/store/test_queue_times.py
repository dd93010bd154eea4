from __future__ import annotations

import sqlalchemy as sa

from qlora_service.queue.claim import Progress
from qlora_service.queue.queue import Queue
from qlora_service.store.database import Database
from qlora_service.store.queue_times import seconds_to_end
from qlora_service.store.tables import jobs
from tests.control_plane import add_job, claim_next, clock, each_database, queue

__all__ = ["clock", "each_database", "queue"]


def add(database: Database, seconds: float | None, priority: int = 0) -> str:
    """A queued job with this forecast; None for no forecast."""
    job_id = add_job(database, priority=priority)
    forecast = {"time": None if seconds is None else {"seconds": seconds}}
    with database.write() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(forecast=forecast))
    return job_id


def ends(database: Database, *job_ids: str) -> dict[str, float]:
    with database.read() as connection:
        return seconds_to_end(connection, job_ids)


def test_jobs_end_one_after_the_other_by_priority(database: Database) -> None:
    first, second, higher = add(database, 100), add(database, 10), add(database, 5, priority=9)
    assert ends(database, first, second, higher) == {higher: 5, first: 105, second: 115}
    assert ends(database, second) == {second: 115}
    assert ends(database) == {}


def test_queued_jobs_start_after_the_running_ones_on_their_slots(database: Database, queue: Queue) -> None:
    for eta in (30.0, 200.0):
        add(database, 1000)
        queue.report(claim_next(queue, f"worker {eta}"), Progress(eta_s=eta))
    first, second, third = add(database, 50), add(database, 60), add(database, 100)
    assert ends(database, first, second, third) == {first: 80, second: 140, third: 240}


def test_running_job_without_an_eta_counts_with_its_forecast(database: Database, queue: Queue) -> None:
    add(database, 70)
    claim_next(queue)
    waiting = add(database, 10)
    assert ends(database, waiting) == {waiting: 80}


def test_jobs_after_one_without_a_forecast_have_no_expected_end(database: Database) -> None:
    before, unknown, after = add(database, 5), add(database, None), add(database, 5)
    assert ends(database, before, unknown, after) == {before: 5}
