"""The API under load, with 100,000 jobs stored: latencies at constant rates, streams, slow clients, memory.

Server and load share the machine, over 127.0.0.1. Every request has a key. `python -m tests.benchmarks api`
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from qlora_service.actions.keys import Access
from qlora_service.domain.ids import new_id
from qlora_service.domain.jobs import JobStatus
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.store.database import Database
from qlora_service.store.jobs import append_event
from qlora_service.store.tables import events, jobs
from tests.benchmarks._http_load import Server, open_loop, percentile
from tests.running_api import ROWS, RunningApi
from tests.tiny_model import build_tiny_model

JOBS, QUEUED, RUNNING = 100_000, 1_000, 500
"""All jobs, and how many of them wait and run; the others have succeeded"""
STEPS = 4
"""That every stored job did, queued ones too"""
BATCH = 5_000
MEASURED: dict[str, Any] = {
    "device": "x86_64 CPU",
    "attempt": 1,
    "predicted": {"memory": {"allocated": 1_900_000_000}, "time": {"seconds": 60.0}, "eta": {"seconds": 50.0}},
    "actual": {"memory": {"allocated": 1_890_000_000}, "time": {"seconds": 66.0}, "eta": {"seconds": 52.0}},
    "phases": {"starting": 4.0, "training": 50.0, "evaluating": 6.0, "certifying": 6.0},
    "steps": STEPS,
    "tokens": 8_000,
    "tokens_per_second": 160.0,
}
"""By every job that has succeeded; jobs that are posted are forecast from the newest"""
SECONDS = 10
"""Of load, per figure"""
READS_PER_S, LISTS_PER_S, POSTS_PER_S, WRITES_PER_S = 200, 20, 20, 100
SLOW_CLIENTS = 500
SLOW_POST = b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n"
SLOW = [(b"", b""), (b"", b"GET /jobs HTTP/1.1\r\nHost: localhost\r\nX-Slow: yes\r\n"), (SLOW_POST, b" " * 999)]
"""What slow clients send at once, and then a byte a second"""


@dataclass(frozen=True)
class Stand:
    api: RunningApi
    server: Server
    database: Database
    dataset_id: str
    ids: list[str]
    """Of the stored jobs, oldest first"""

    @property
    def running(self) -> list[str]:
        return self.ids[-QUEUED - RUNNING : -QUEUED]

    def memory_mb(self) -> float:
        """The most that the API's process had in memory so far."""
        status = Path(f"/proc/{self.api.pid()}/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) / 1000


def figures() -> Iterator[dict[str, Any]]:
    # Not /tmp, which may lie in memory: every job is flushed to disk.
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="bench-api-") as directory:
        data_dir = Path(directory)
        Catalog(data_dir / "models").import_model("tiny", build_tiny_model(data_dir / "source"))
        database = Database(f"sqlite:///{data_dir / 'state.db'}")
        database.migrate()
        with closing(database):
            made = Access(database).create_first_key()
            assert made is not None
            prelude = "import os; os.environ |= {'QLORA_KEYS': 'required', 'QLORA_LOG_LEVEL': 'INFO'}"
            with RunningApi(data_dir, prelude) as api:
                server = Server(api.port, {"Authorization": f"Bearer {made[1]}"})
                dataset_id = asyncio.run(_post(server, "/datasets", _rows()))["id"]
                first = asyncio.run(_post(server, "/jobs", _spec(dataset_id)))
                ids = _store_jobs(database, dataset_id, first["id"])
                # A full collection of this process, which has torch in it, would count as the server's latency.
                gc.collect()
                gc.freeze()
                yield from _measure(Stand(api, server, database, dataset_id, ids))


def _measure(stand: Stand) -> Iterator[dict[str, Any]]:
    server, chance = stand.server, random.Random(0)
    reads = [server.request("GET", f"/jobs/{chance.choice(stand.ids)}") for _ in range(READS_PER_S * SECONDS)]
    # Every other page is the newest, whose jobs wait: each one's place in the queue is counted.
    pages = [f"?after={chance.choice(stand.ids)}" if n % 2 else "" for n in range(LISTS_PER_S * SECONDS)]
    lists = [server.request("GET", f"/jobs{page}") for page in pages]
    posts = [server.request("POST", "/jobs", _spec(stand.dataset_id)) for _ in range(POSTS_PER_S * SECONDS)]
    yield _told("jobs stored", len(stand.ids), "jobs")
    for name, requests, rate, status, must in (
        ("GET /jobs/{id}", reads, READS_PER_S, 200, 10),
        ("GET /jobs, a page of 20", lists, LISTS_PER_S, 200, 25),
        ("durable POST /jobs on a stored dataset", posts, POSTS_PER_S, 201, 40),
    ):
        latencies = asyncio.run(open_loop(server, requests, rate, status))
        yield from _latencies(f"{name}, {rate}/s", latencies, must)
    delays, others = asyncio.run(_watch(stand))
    watched = f"{RUNNING} watchers, event written to event received"
    yield _figure(f"{watched}, longest", 1000 * max(delays), "ms", 250)
    yield _told(f"{watched}, median", 1000 * percentile(delays, 0.5), "ms")
    yield from _latencies(f"GET /jobs/{{id}} meanwhile, {READS_PER_S // 4}/s", others, None)
    closed, others = asyncio.run(_slow_clients(stand))
    yield _figure(f"{SLOW_CLIENTS} slow clients, the last one closed after", max(closed), "s", 15)
    yield from _latencies(f"GET /jobs/{{id}} meanwhile, {READS_PER_S // 4}/s", others, 100)
    yield _figure("most memory of the API's process", stand.memory_mb(), "MB", 300)


async def _watch(stand: Stand) -> tuple[list[float], list[float]]:
    """Seconds from each event's commit until the watcher of its job had it; latencies of other requests meanwhile."""
    written: dict[str, float] = {}
    delays: dict[str, float] = {}
    ready = asyncio.Semaphore(0)

    async def watch(job_id: str) -> None:
        connection = await stand.server.connect()
        async for event in connection.events(stand.server.request("GET", f"/jobs/{job_id}/events")):
            received, step = time.perf_counter(), _step(event)
            if step == STEPS:
                ready.release()
            elif step > STEPS:
                delays[job_id] = received
                break
        connection.writer.close()

    def write() -> None:
        for number, job_id in enumerate(random.Random(1).sample(stand.running, RUNNING)):
            time.sleep(max(0.0, begin + number / WRITES_PER_S - time.perf_counter()))
            with stand.database.write() as connection:
                append_event(connection, job_id, datetime.now(UTC), "metrics", {"step": STEPS + 1})
            written[job_id] = time.perf_counter()

    async with asyncio.TaskGroup() as tasks:
        for job_id in stand.running:
            tasks.create_task(watch(job_id))
        for _ in stand.running:
            await ready.acquire()
        begin = time.perf_counter()
        writing = asyncio.create_task(asyncio.to_thread(write))
        others = await _others(stand, RUNNING / WRITES_PER_S)
        await writing
    # The reader may be told before the writer, which waits for its turn, has read the clock.
    return [max(0.0, delays[job_id] - written[job_id]) for job_id in stand.running], others


def _step(event: bytes) -> int:
    """The step that the event tells of; 0 for a comment."""
    data = event.partition(b"data: ")[2].partition(b"\n")[0]
    return int(json.loads(data)["step"]) if data else 0


async def _slow_clients(stand: Stand) -> tuple[list[float], list[float]]:
    """Seconds until each slow client was closed; latencies of other requests meanwhile."""
    async with asyncio.TaskGroup() as tasks:
        slow = [tasks.create_task(_slow_client(stand.api.port, *SLOW[number % 3])) for number in range(SLOW_CLIENTS)]
        others = await _others(stand, SECONDS + 2)
    return [task.result() for task in slow], others


async def _slow_client(port: int, first: bytes, rest: bytes) -> float:
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(first)
    for byte in rest:
        writer.write(bytes([byte]))
        if await _closed(reader, 1.0):
            break
    else:
        await _closed(reader, 60.0)
    writer.close()
    return time.perf_counter() - started


async def _closed(reader: asyncio.StreamReader, within_s: float) -> bool:
    try:
        await asyncio.wait_for(reader.read(), within_s)
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


async def _others(stand: Stand, seconds: float) -> list[float]:
    """Latencies of reads during so many seconds, at a quarter of the rate."""
    rate = READS_PER_S // 4
    request = stand.server.request("GET", f"/jobs/{stand.ids[0]}")
    return await open_loop(stand.server, [request] * int(rate * seconds), rate, 200)


async def _post(server: Server, target: str, body: bytes) -> dict[str, Any]:
    connection = await server.connect()
    status, answer = await connection.ask(server.request("POST", target, body))
    connection.writer.close()
    assert status == 201, answer
    stored: dict[str, Any] = json.loads(answer)
    return stored


def _store_jobs(database: Database, dataset_id: str, template: str) -> list[str]:
    """Ids of JOBS jobs like `template`, each with an event per step."""
    with database.read() as connection:
        row = dict(connection.execute(sa.select(jobs).where(jobs.c.id == template)).one()._mapping)
    now, ids = datetime.now(UTC), []
    for begin in range(0, JOBS, BATCH):
        rows = []
        for number in range(begin, begin + BATCH):
            ended = number < JOBS - QUEUED - RUNNING
            status = JobStatus.SUCCEEDED if ended else JobStatus.RUNNING if number < JOBS - QUEUED else JobStatus.QUEUED
            started = None if status is JobStatus.QUEUED else now
            rows.append(
                row
                | {"id": new_id("job"), "status": status, "started_at": started, "created_at": now, "attempt": 1}
                | {"metrics": {"step": STEPS, "loss": 1.25, "tokens": 64}, "finished_at": now if ended else None}
                | {"result": {"attempt": 1, "eval_loss": 1.2} if ended else None, "lease_until": 1e12, "step": STEPS}
                | {"measured": MEASURED if ended else None}
            )
        history = [
            {"job_id": job["id"], "at": now + timedelta(seconds=step), "type": "metrics", "data": {"step": step}}
            for job in rows
            for step in range(1, STEPS + 1)
        ]
        with database.write() as connection:
            connection.execute(jobs.insert(), rows)
            connection.execute(events.insert(), history)
        ids += [job["id"] for job in rows]
    return ids


def _rows() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def _spec(dataset_id: str) -> bytes:
    spec = {"base_model": "tiny", "dataset": {"id": dataset_id}, "training": {"max_seq_len_tokens": 128}}
    return json.dumps(spec).encode()


def _latencies(name: str, seconds: list[float], must_ms: float | None) -> Iterator[dict[str, Any]]:
    yield _figure(f"{name}, p99", 1000 * percentile(seconds, 0.99), "ms", must_ms)
    yield _told(f"{name}, median", 1000 * percentile(seconds, 0.5), "ms")


def _told(name: str, value: float, unit: str) -> dict[str, Any]:
    return _figure(name, value, unit, None)


def _figure(name: str, value: float, unit: str, must: float | None) -> dict[str, Any]:
    return {"figure": name, "value": round(value, 2), "unit": unit, "must": must, "better": "lower"}
