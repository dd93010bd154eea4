"""The feed over a real database, without HTTP: what slow, early and many watchers get."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager

import anyio
import pytest
import sqlalchemy as sa

import api.event_feed
from api.event_feed import BATCH, MOST_WAITING, POLL_S, EventFeed, Topic, running_feed
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
    """The steps that a watcher of the job is told, up to the step `until`; also in `seen`, as they come."""
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
def statements() -> Iterator[list[str]]:
    """What any database is asked meanwhile."""
    asked: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("SELECT"):
            asked.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        yield asked
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)


def test_many_watchers_are_told_each_event_once_and_in_order(database: Database) -> None:
    jobs = [add_job(database) for _ in range(5)]

    async def watch() -> list[list[int]]:
        async with feed_over(database) as feed:
            told = [asyncio.create_task(steps(feed, database, job_id, until=300)) for job_id in jobs for _ in range(4)]
            # Written while the watchers enter, read history and go on.
            for start in range(1, 300, 20):
                for job_id in jobs:
                    await anyio.to_thread.run_sync(write, database, job_id, *range(start, start + 20))
            return await asyncio.gather(*told)

    assert asyncio.run(watch()) == [list(range(1, 301))] * 20


def test_event_that_is_committed_while_history_is_read_is_told(database: Database) -> None:
    job_id = add_job(database)
    stored = reader(database, job_id)
    written: list[int] = []

    def read(seq: int) -> list[JobEvent]:
        history = stored(seq)
        if not written:
            written.append(1)
            write(database, job_id, 1)
            time.sleep(6 * POLL_S)  # the feed hands it out before the history is there
        return history

    async def watch() -> list[str]:
        async with feed_over(database) as feed, aclosing(feed.follow(("job", job_id), read, 0)) as events:
            return [(await anext(events)).type, (await anext(events)).type]

    assert asyncio.run(watch()) == ["status", "metrics"]


def test_watchers_share_one_reader(database: Database) -> None:
    job_id = add_job(database)

    write(database, job_id, 1)

    async def watch() -> tuple[int, float]:
        async with feed_over(database) as feed:
            seen: list[list[int]] = [[] for _ in range(30)]
            told = [asyncio.create_task(steps(feed, database, job_id, until=2, seen=mine)) for mine in seen]
            while seen != [[1]] * 30:  # each has read what there was, and waits
                await anyio.sleep(0.01)
            began = time.monotonic()
            with statements() as asked:
                await anyio.sleep(0.5)
            waited_s = time.monotonic() - began
            await anyio.to_thread.run_sync(write, database, job_id, 2)
            assert await asyncio.gather(*told) == [[1, 2]] * 30
            return len(asked), waited_s

    asked, waited_s = asyncio.run(watch())
    assert 2 <= asked <= waited_s / POLL_S + 1


def test_nothing_is_read_while_nobody_watches(database: Database) -> None:
    job_id = add_job(database)
    write(database, job_id, 1)

    async def watch() -> tuple[list[str], list[int]]:
        async with feed_over(database) as feed:
            assert await steps(feed, database, job_id, until=1) == [1]
            await anyio.sleep(0.2)
            with statements() as asked:
                await anyio.sleep(0.3)
            # What happened meanwhile is not missed by who comes later.
            write(database, job_id, 2)
            later = asyncio.create_task(steps(feed, database, job_id, until=3))
            await anyio.sleep(0.2)
            write(database, job_id, 3)
            return asked, await later

    assert asyncio.run(watch()) == ([], [1, 2, 3])


def test_slow_watcher_is_bounded_and_still_told_everything(database: Database) -> None:
    job_id = add_job(database)
    count = 3 * MOST_WAITING

    async def watch() -> list[int]:
        read = reader(database, job_id)
        async with feed_over(database) as feed, aclosing(feed.follow(("job", job_id), read, 0)) as events:
            await anext(events)
            write(database, job_id, 0)
            seen = [(await anext(events)).data["step"]]
            # Its client does not read: the feed goes on without it.
            (watcher,) = feed._watchers["job", job_id]
            for start in range(1, count, 50):
                write(database, job_id, *range(start, min(start + 50, count)))
                await anyio.sleep(2 * POLL_S)
                assert len(watcher._waiting) <= MOST_WAITING
            assert watcher.behind
            while len(seen) < count:
                seen.append((await anext(events)).data["step"])
            return seen

    assert asyncio.run(watch()) == list(range(count))


def test_watcher_of_a_project_is_told_nothing_of_another(database: Database) -> None:
    mine, foreign = add_job(database), add_job(database, project="other")
    topic: Topic = ("project", "local")

    def read(seq: int) -> list[JobEvent]:
        with database.read() as connection:
            return project_events_after(connection, "local", seq, types=None, limit=BATCH)

    async def watch() -> list[str]:
        async with feed_over(database) as feed, aclosing(feed.follow(topic, read, 0)) as events:
            seen = [(await anext(events)).job_id]
            write(database, foreign, 1)
            write(database, mine, 1)
            return [*seen, (await anext(events)).job_id]

    assert asyncio.run(watch()) == [mine, mine]


def test_feed_outlives_an_outage(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.event_feed, "RETRY_S", 0.05)
    job_id = add_job(database)

    def rename(old: str, new: str) -> None:
        with database.write() as connection:
            connection.exec_driver_sql(f"ALTER TABLE {old} RENAME TO {new}")

    async def watch() -> list[int]:
        async with feed_over(database) as feed:
            told = asyncio.create_task(steps(feed, database, job_id, until=1, after=None))
            while feed._seq is None:
                await anyio.sleep(0.01)
            await anyio.sleep(0.1)
            rename("events", "events_away")
            await anyio.sleep(0.3)
            rename("events_away", "events")
            write(database, job_id, 1)
            return await told

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


def test_events_of_two_jobs_are_numbered_in_the_order_of_their_commits(postgres_url: str) -> None:
    database = Database(postgres_url)
    first, second = add_job(database), add_job(database)
    known = job_events(database, second)[-1].seq

    async def watch() -> tuple[list[JobEvent], list[JobEvent]]:
        with database.write() as connection:
            append_event(connection, first, START, "metrics", {"step": 1})
            other = asyncio.create_task(anyio.to_thread.run_sync(write, database, second, 1))
            done, _ = await asyncio.wait([other], timeout=0.5)
            # A reader that saw the second job's event now would have missed the first's for ever.
            assert not done
            meanwhile = job_events(database, second)
        await other
        return meanwhile, job_events(database, first)[-1:] + job_events(database, second)[-1:]

    meanwhile, (one, two) = asyncio.run(watch())
    assert meanwhile[-1].seq == known
    assert known < one.seq < two.seq
    database.close()
