"""The event feed over a real database, without HTTP: slow subscribers, early subscribers, many subscribers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager

import anyio
import pytest
import sqlalchemy as sa

import api.event_feed
from api.event_feed import BATCH, MAX_PENDING, POLL_S, EventFeed, Topic, running_feed
from qlora_service.domain.jobs import JobEvent
from qlora_service.store.database import Database
from qlora_service.store.jobs import append_event, events_after, project_events_after
from tests.control_plane import START, add_job, database, job_events

__all__ = ["database"]


def write(database: Database, job_id: str, *numbers: int) -> None:
    with database.write() as connection:
        for number in numbers:
            append_event(connection, job_id, START, "metrics", {"step": number})


def reader(database: Database, job_id: str) -> Callable[[int], list[JobEvent]]:
    def read(seq: int) -> list[JobEvent]:
        with database.read() as connection:
            return events_after(connection, job_id, seq, limit=BATCH)

    return read


async def steps(
    feed: EventFeed,
    database: Database,
    job_id: str,
    until: int,
    after: int | None = 0,
    seen: list[int] | None = None,
) -> list[int]:
    """The steps that a subscriber to the job receives, up to the step `until`; also appended to `seen` one by one."""
    seen = [] if seen is None else seen
    async with aclosing(feed.follow(("job", job_id), reader(database, job_id), after)) as events:
        async for event in events:
            if event.type == "metrics":
                seen.append(event.data["step"])
                if seen[-1] == until:
                    break
    return seen


@asynccontextmanager
async def feed_over(database: Database) -> AsyncIterator[EventFeed]:
    with anyio.fail_after(20):
        async with running_feed(database.url, lambda: False) as feed:
            yield feed


@contextmanager
def recorded_queries() -> Iterator[list[str]]:
    """The SELECT statements on any database while the context lasts."""
    queries: list[str] = []

    def record(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("SELECT"):
            queries.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", record)
    try:
        yield queries
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", record)


def test_many_subscribers_receive_each_event_once_and_in_order(database: Database) -> None:
    jobs = [add_job(database) for _ in range(5)]

    async def watch() -> list[list[int]]:
        async with feed_over(database) as feed:
            tasks = [asyncio.create_task(steps(feed, database, job_id, until=300)) for job_id in jobs for _ in range(4)]
            # Written while the subscribers register, read their history and continue with new events.
            for start in range(1, 300, 20):
                for job_id in jobs:
                    await anyio.to_thread.run_sync(write, database, job_id, *range(start, start + 20))
            return await asyncio.gather(*tasks)

    assert asyncio.run(watch()) == [list(range(1, 301))] * 20


def test_event_committed_while_history_is_read_is_delivered(database: Database) -> None:
    job_id = add_job(database)
    stored = reader(database, job_id)
    written: list[int] = []

    def read(seq: int) -> list[JobEvent]:
        history = stored(seq)
        if not written:
            written.append(1)
            write(database, job_id, 1)
            time.sleep(6 * POLL_S)  # the feed delivers it before the history is returned
        return history

    async def watch() -> list[str]:
        async with feed_over(database) as feed, aclosing(feed.follow(("job", job_id), read, 0)) as events:
            return [(await anext(events)).type, (await anext(events)).type]

    assert asyncio.run(watch()) == ["status", "metrics"]


def test_subscribers_share_one_reader(database: Database) -> None:
    job_id = add_job(database)
    write(database, job_id, 1)

    async def watch() -> tuple[int, float]:
        async with feed_over(database) as feed:
            seen: list[list[int]] = [[] for _ in range(30)]
            tasks = [asyncio.create_task(steps(feed, database, job_id, until=2, seen=each)) for each in seen]
            while seen != [[1]] * 30:  # each has read its history, and waits for new events
                await anyio.sleep(0.01)
            started = time.monotonic()
            with recorded_queries() as queries:
                await anyio.sleep(0.5)
            waited_s = time.monotonic() - started
            await anyio.to_thread.run_sync(write, database, job_id, 2)
            assert await asyncio.gather(*tasks) == [[1, 2]] * 30
            return len(queries), waited_s

    query_count, waited_s = asyncio.run(watch())
    assert 2 <= query_count <= waited_s / POLL_S + 1


def test_database_is_not_queried_without_subscribers(database: Database) -> None:
    job_id = add_job(database)
    write(database, job_id, 1)

    async def watch() -> tuple[list[str], list[int]]:
        async with feed_over(database) as feed:
            assert await steps(feed, database, job_id, until=1) == [1]
            await anyio.sleep(0.2)
            with recorded_queries() as queries:
                await anyio.sleep(0.3)
            # A later subscriber also receives the events committed in between.
            write(database, job_id, 2)
            later = asyncio.create_task(steps(feed, database, job_id, until=3))
            await anyio.sleep(0.2)
            write(database, job_id, 3)
            return queries, await later

    assert asyncio.run(watch()) == ([], [1, 2, 3])


def test_slow_subscriber_has_a_bounded_queue_and_receives_every_event(database: Database) -> None:
    job_id = add_job(database)
    count = 3 * MAX_PENDING

    async def watch() -> list[int]:
        read = reader(database, job_id)
        async with feed_over(database) as feed, aclosing(feed.follow(("job", job_id), read, 0)) as events:
            await anext(events)
            write(database, job_id, 0)
            seen = [(await anext(events)).data["step"]]
            # The client does not read: the feed continues without waiting for it.
            (subscriber,) = feed._subscribers["job", job_id]
            for start in range(1, count, 50):
                write(database, job_id, *range(start, min(start + 50, count)))
                await anyio.sleep(2 * POLL_S)
                assert len(subscriber._pending) <= MAX_PENDING
            assert subscriber.has_dropped
            while len(seen) < count:
                seen.append((await anext(events)).data["step"])
            return seen

    assert asyncio.run(watch()) == list(range(count))


def test_subscriber_to_a_project_receives_no_events_of_another_project(database: Database) -> None:
    own_job, foreign_job = add_job(database), add_job(database, project="other")
    topic: Topic = ("project", "local")

    def read(seq: int) -> list[JobEvent]:
        with database.read() as connection:
            return project_events_after(connection, "local", seq, types=None, limit=BATCH)

    async def watch() -> list[str]:
        async with feed_over(database) as feed, aclosing(feed.follow(topic, read, 0)) as events:
            seen = [(await anext(events)).job_id]
            write(database, foreign_job, 1)
            write(database, own_job, 1)
            return [*seen, (await anext(events)).job_id]

    assert asyncio.run(watch()) == [own_job, own_job]


def test_feed_survives_a_database_outage(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.event_feed, "RETRY_S", 0.05)
    job_id = add_job(database)

    def rename(old: str, new: str) -> None:
        with database.write() as connection:
            connection.exec_driver_sql(f"ALTER TABLE {old} RENAME TO {new}")

    async def watch() -> list[int]:
        async with feed_over(database) as feed:
            received = asyncio.create_task(steps(feed, database, job_id, until=1, after=None))
            while feed._seq is None:
                await anyio.sleep(0.01)
            await anyio.sleep(0.1)
            rename("events", "events_away")
            await anyio.sleep(0.3)
            rename("events_away", "events")
            write(database, job_id, 1)
            return await received

    assert asyncio.run(watch()) == [1]


def test_streams_end_when_the_service_stops(database: Database) -> None:
    job_id, stopping = add_job(database), False

    async def watch() -> list[str]:
        nonlocal stopping
        with anyio.fail_after(10):
            async with running_feed(database.url, lambda: stopping) as feed:
                events = feed.follow(("job", job_id), reader(database, job_id), 0)
                seen = [(await anext(events)).type]
                stopping = True
                return seen + [event.type async for event in events]

    assert asyncio.run(watch()) == ["status"]


def test_sequence_numbers_of_two_jobs_grow_in_commit_order(postgres_url: str) -> None:
    database = Database(postgres_url)
    first, second = add_job(database), add_job(database)
    known = job_events(database, second)[-1].seq

    async def watch() -> tuple[list[JobEvent], list[JobEvent]]:
        with database.write() as connection:
            append_event(connection, first, START, "metrics", {"step": 1})
            other = asyncio.create_task(anyio.to_thread.run_sync(write, database, second, 1))
            done, _ = await asyncio.wait([other], timeout=0.5)
            # If a reader saw the second job's event now, it would never read the first job's event.
            assert not done
            meanwhile = job_events(database, second)
        await other
        return meanwhile, job_events(database, first)[-1:] + job_events(database, second)[-1:]

    meanwhile, (one, two) = asyncio.run(watch())
    assert meanwhile[-1].seq == known
    assert known < one.seq < two.seq
    database.close()
