"""Events as they are committed, for any number of watchers: one reader of the table per process.

A watcher replays history from the database and goes on with what the feed hands out. It enters first and reads then,
so what is committed in between comes twice, and the second time is told by its number: numbers grow in the order of
commits (`store.jobs.append_event`).
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
# Events of one reading; a watcher's history is read in several.
TAIL = 1000
BATCH = 100
# Events that wait for a watcher whose client reads slowly; then they are forgotten, and read again when it is ready.
MOST_WAITING = 100

Topic = tuple[str, str]
"""`("job", id)` or `("project", id)`: whose events are watched."""
Read = Callable[[int], list[JobEvent]]
"""Up to BATCH events of a topic after a number, from the database; fewer are the last."""

log = structlog.get_logger("api")


class EventFeed:
    """Hands out new events while somebody watches; reads nothing otherwise."""

    def __init__(self, database: Database, stopping: Callable[[], bool]) -> None:
        """`stopping` says when every stream is to end, so that its client goes on elsewhere."""
        self._database = database
        self._stopping = stopping
        self._watchers: defaultdict[Topic, set[_Watcher]] = defaultdict(set)
        self._watched = asyncio.Event()
        # What was handed out so far; None while nobody watches.
        self._seq: int | None = None

    async def run(self) -> None:
        """Until cancelled, or the service is stopping."""
        # Its own thread: requests may hold all the others.
        limiter = CapacityLimiter(1)
        while not self._stopping():
            await self._watched.wait()
            if not self._watchers:
                self._seq = None
                self._watched.clear()
                continue
            try:
                events = await to_thread.run_sync(self._tail, limiter=limiter)
            except Exception as error:  # noqa: BLE001  whatever it is, streams go on once it is over
                log.warning("event_feed_waits", error=type(error).__qualname__)
                await anyio.sleep(RETRY_S)
                continue
            self._hand_out(events)
            if len(events) < TAIL:
                await anyio.sleep(POLL_S)
        for watcher in [watcher for watchers in self._watchers.values() for watcher in watchers]:
            watcher.wake()

    async def follow(self, topic: Topic, read: Read, after: int | None) -> AsyncGenerator[JobEvent]:
        """The topic's events after number `after`, each once and in order, until the service is stopping.

        None is now. So is a number that there is not yet: it comes from another database, or from nowhere.
        """
        with self._watching(topic) as watcher:
            newest = await run_in_threadpool(self._newest)
            if self._seq is None:
                self._seq = newest
                self._watched.set()
            seq = newest if after is None else min(after, newest)
            while not self._stopping():
                watcher.catch_up()
                async for event in self.history(read, seq):
                    seq = event.seq
                    yield event
                while not watcher.behind and not self._stopping():
                    for event in await watcher.take():
                        if event.seq > seq:
                            seq = event.seq
                            yield event

    async def history(self, read: Read, seq: int) -> AsyncGenerator[JobEvent]:
        """What is stored after number `seq`, until the service is stopping."""
        full = True
        while full and not self._stopping():
            events = await run_in_threadpool(read, seq)
            for event in events:
                yield event
            full = len(events) >= BATCH
            seq = events[-1].seq if events else seq

    @contextmanager
    def _watching(self, topic: Topic) -> Iterator[_Watcher]:
        watcher = _Watcher()
        self._watchers[topic].add(watcher)
        try:
            yield watcher
        finally:
            self._watchers[topic].remove(watcher)
            if not self._watchers[topic]:
                del self._watchers[topic]

    def _hand_out(self, events: Iterable[tuple[str, JobEvent]]) -> None:
        for project, event in events:
            for topic in (("job", event.job_id), ("project", project)):
                for watcher in self._watchers.get(topic, ()):
                    watcher.put(event)
            self._seq = event.seq

    def _tail(self) -> list[tuple[str, JobEvent]]:
        assert self._seq is not None
        with self._database.read() as connection:
            return tail_events(connection, self._seq, TAIL)

    def _newest(self) -> int:
        with self._database.read() as connection:
            return last_seq(connection)


@asynccontextmanager
async def running_feed(database_url: str, stopping: Callable[[], bool]) -> AsyncIterator[EventFeed]:
    """A feed that runs while the context lasts, on connections of its own: requests may hold the service's."""
    database = Database(database_url)
    feed = EventFeed(database, stopping)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(feed.run)
        try:
            yield feed
        finally:
            tasks.cancel_scope.cancel()
            database.close()


class _Watcher:
    """New events on their way to one stream."""

    def __init__(self) -> None:
        self._waiting: deque[JobEvent] = deque()
        self._woken = asyncio.Event()
        self.behind = False
        """Whether events were forgotten since `catch_up`: they are in the database."""

    def put(self, event: JobEvent) -> None:
        if self.behind:
            return
        self._waiting.append(event)
        if len(self._waiting) > MOST_WAITING:
            self._waiting.clear()
            self.behind = True
        self.wake()

    def wake(self) -> None:
        self._woken.set()

    def catch_up(self) -> None:
        """What is read from the database from now on joins what is taken later without a gap."""
        self._waiting.clear()
        self.behind = False

    async def take(self) -> list[JobEvent]:
        """What was put since the last time, after waiting for it; nothing when woken for another reason."""
        await self._woken.wait()
        self._woken.clear()
        taken = list(self._waiting)
        self._waiting.clear()
        return taken
