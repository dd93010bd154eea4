"""Feed of committed events: one reader of the events table per process, for any number of subscribers.

A subscriber registers first, then replays its history from the database, then continues with the events that the feed
delivers. An event that is committed during the replay arrives twice; its sequence number identifies the second copy,
because sequence numbers grow in commit order (`store.jobs.append_event`).
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager

import anyio
import structlog
from anyio import CapacityLimiter, to_thread
from starlette.concurrency import run_in_threadpool

from qlora_service.domain.jobs import JobEvent
from qlora_service.store.database import Database
from qlora_service.store.jobs import last_seq, tail_events

POLL_S = 0.05
RETRY_S = 1.0
TAIL_EVENTS = 1000
"""Maximum number of new events per query of the feed."""
BATCH = 100
"""Maximum number of events per query of a subscriber's history."""
MAX_PENDING = 100
"""Maximum number of undelivered events of a subscriber whose client reads slowly; beyond it, the feed drops them, and
the subscriber reads them from the database when its client has caught up."""

Topic = tuple[str, str]
"""`("job", job_id)` or `("project", project)`: the job or project whose events a subscriber receives."""
ReadHistory = Callable[[int], list[JobEvent]]
"""Up to BATCH events of a topic after a sequence number, from the database; fewer than BATCH are the last ones."""

log = structlog.get_logger("api")


class EventFeed:
    """Delivers new events to subscribers; without subscribers, it does not query the database."""

    def __init__(self, database: Database, stopping: Callable[[], bool]) -> None:
        """`stopping` returns whether every stream must end, so that clients reconnect to another process."""
        self._database = database
        self._stopping = stopping
        self._subscribers: defaultdict[Topic, set[_Subscriber]] = defaultdict(set)
        self._has_subscribers = asyncio.Event()
        # The last sequence number delivered; None without subscribers.
        self._seq: int | None = None

    async def run(self) -> None:
        """Delivers events until it is cancelled or the service is stopping."""
        # A thread of its own: requests may occupy all the others.
        limiter = CapacityLimiter(1)
        while not self._stopping():
            await self._has_subscribers.wait()
            if not self._subscribers:
                self._seq = None
                self._has_subscribers.clear()
                continue
            try:
                events = await to_thread.run_sync(self._tail, limiter=limiter)
            except Exception as error:  # noqa: BLE001  streams must survive any failure of a query
                log.warning("event_feed_query_failed", error=type(error).__qualname__)
                await anyio.sleep(RETRY_S)
                continue
            self._deliver(events)
            if len(events) < TAIL_EVENTS:
                await anyio.sleep(POLL_S)
        for subscriber in [subscriber for subscribers in self._subscribers.values() for subscriber in subscribers]:
            subscriber.wake()

    async def follow(self, topic: Topic, read_history: ReadHistory, after: int | None) -> AsyncGenerator[JobEvent]:
        """The topic's events after sequence number `after`, each once and in order, until the service is stopping.

        With None, only events from now on. A number that is larger than any stored one also means now: it comes from
        another database or is arbitrary.
        """
        with self._subscription(topic) as subscriber:
            newest = await run_in_threadpool(self._newest)
            if self._seq is None:
                self._seq = newest
                self._has_subscribers.set()
            seq = newest if after is None else min(after, newest)
            while not self._stopping():
                subscriber.reset()
                async for event in self.history(read_history, seq):
                    seq = event.seq
                    yield event
                while not subscriber.has_dropped and not self._stopping():
                    for event in await subscriber.wait():
                        if event.seq > seq:
                            seq = event.seq
                            yield event

    async def history(self, read_history: ReadHistory, seq: int) -> AsyncGenerator[JobEvent]:
        """The stored events after sequence number `seq`, until the service is stopping."""
        full = True
        while full and not self._stopping():
            events = await run_in_threadpool(read_history, seq)
            for event in events:
                yield event
            full = len(events) >= BATCH
            seq = events[-1].seq if events else seq

    @contextmanager
    def _subscription(self, topic: Topic) -> Iterator[_Subscriber]:
        subscriber = _Subscriber()
        self._subscribers[topic].add(subscriber)
        try:
            yield subscriber
        finally:
            self._subscribers[topic].remove(subscriber)
            if not self._subscribers[topic]:
                del self._subscribers[topic]

    def _deliver(self, events: Iterable[tuple[str, JobEvent]]) -> None:
        for project, event in events:
            for topic in (("job", event.job_id), ("project", project)):
                for subscriber in self._subscribers.get(topic, ()):
                    subscriber.put(event)
            self._seq = event.seq

    def _tail(self) -> list[tuple[str, JobEvent]]:
        assert self._seq is not None
        with self._database.read() as connection:
            return tail_events(connection, self._seq, TAIL_EVENTS)

    def _newest(self) -> int:
        with self._database.read() as connection:
            return last_seq(connection)


@asynccontextmanager
async def running_feed(database_url: str, stopping: Callable[[], bool]) -> AsyncIterator[EventFeed]:
    """A feed that runs while the context lasts, on its own database connections: requests may occupy the service's."""
    database = Database(database_url)
    feed = EventFeed(database, stopping)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(feed.run)
        try:
            yield feed
        finally:
            tasks.cancel_scope.cancel()
            database.close()


class _Subscriber:
    """Queue of new events for one stream, of at most MAX_PENDING events."""

    def __init__(self) -> None:
        self._pending: deque[JobEvent] = deque()
        self._woken = asyncio.Event()
        self.has_dropped = False
        """Whether events were dropped since `reset`: the database has them."""

    def put(self, event: JobEvent) -> None:
        if self.has_dropped:
            return
        self._pending.append(event)
        if len(self._pending) > MAX_PENDING:
            self._pending.clear()
            self.has_dropped = True
        self.wake()

    def wake(self) -> None:
        self._woken.set()

    def reset(self) -> None:
        """Empties the queue. Events read from the database after this call join the queued ones without a gap."""
        self._pending.clear()
        self.has_dropped = False

    async def wait(self) -> list[JobEvent]:
        """The events put since the last call, after waiting for them; empty if woken for another reason."""
        await self._woken.wait()
        self._woken.clear()
        events = list(self._pending)
        self._pending.clear()
        return events
