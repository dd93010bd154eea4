"""The API under load with 100,000 stored jobs: latencies at constant rates, streams, slow clients, memory.

Server and clients run on the same machine, over 127.0.0.1. Every request has a key. `python -m tests.benchmarks api`
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

from qlora_service.actions.keys import KeyRegistry
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
"""Number of all, queued and running jobs; the others have succeeded"""
STEPS = 4
"""Steps of every stored job, including queued ones"""
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
"""Measurements of every succeeded job; the newest ones are used for the forecasts of posted jobs"""
SECONDS = 10
"""Duration of the load per figure"""
READS_PER_S, LISTS_PER_S, POSTS_PER_S, WRITES_PER_S = 200, 20, 20, 100
SLOW_CLIENTS = 500
SLOW_POST = b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n"
SLOW = [(b"", b""), (b"", b"GET /jobs HTTP/1.1\r\nHost: localhost\r\nX-Slow: yes\r\n"), (SLOW_POST, b" " * 999)]
"""Bytes that slow clients send at once, and bytes that they send at one per second"""


@dataclass(frozen=True)
class LoadedApi:
    """A running API with stored jobs."""

    api: RunningApi
    server: Server
    database: Database
    dataset_id: str
    ids: list[str]
    """Ids of the stored jobs, oldest first"""

    @property
    def running(self) -> list[str]:
        return self.ids[-QUEUED - RUNNING : -QUEUED]

    def memory_mb(self) -> float:
        """Peak memory of the API process so far."""
        status = Path(f"/proc/{self.api.pid()}/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) / 1000


def figures() -> Iterator[dict[str, Any]]:
    # Not /tmp, which may be in memory: every job is flushed to disk.
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="bench-api-") as directory:
        data_dir = Path(directory)
        Catalog(data_dir / "models").import_model("tiny", build_tiny_model(data_dir / "source"))
        database = Database(f"sqlite:///{data_dir / 'state.db'}")
        database.migrate()
        with closing(database):
            created = KeyRegistry(database).create_first_key()
            assert created is not None
            prelude = "import os; os.environ |= {'QLORA_KEYS': 'required', 'QLORA_LOG_LEVEL': 'INFO'}"
            with RunningApi(data_dir, prelude) as api:
                server = Server(api.port, {"Authorization": f"Bearer {created[1]}"})
                dataset_id = asyncio.run(_post(server, "/datasets", _rows()))["id"]
                first = asyncio.run(_post(server, "/jobs", _spec(dataset_id)))
                ids = _store_jobs(database, dataset_id, first["id"])
                # A full garbage collection in this process, which has torch loaded, would count as server latency.
                gc.collect()
                gc.freeze()
                yield from _measure(LoadedApi(api, server, database, dataset_id, ids))


def _measure(target: LoadedApi) -> Iterator[dict[str, Any]]:
    server, generator = target.server, random.Random(0)
    reads = [server.request("GET", f"/jobs/{generator.choice(target.ids)}") for _ in range(READS_PER_S * SECONDS)]
    # Every second page is the newest, with queued jobs, whose queue positions are counted.
    pages = [f"?after={generator.choice(target.ids)}" if n % 2 else "" for n in range(LISTS_PER_S * SECONDS)]
    lists = [server.request("GET", f"/jobs{page}") for page in pages]
    posts = [server.request("POST", "/jobs", _spec(target.dataset_id)) for _ in range(POSTS_PER_S * SECONDS)]
    yield _figure("jobs stored", len(target.ids), "jobs")
    for name, requests, rate, status, must in (
        ("GET /jobs/{id}", reads, READS_PER_S, 200, 10),
        ("GET /jobs, a page of 20", lists, LISTS_PER_S, 200, 25),
        ("durable POST /jobs on a stored dataset", posts, POSTS_PER_S, 201, 40),
    ):
        latencies = asyncio.run(open_loop(server, requests, rate, status))
        yield from _latencies(f"{name}, {rate}/s", latencies, must)
    delays, reads_s = asyncio.run(_watch(target))
    name = f"{RUNNING} watchers, event written to event received"
    yield _figure(f"{name}, longest", 1000 * max(delays), "ms", 250)
    yield _figure(f"{name}, median", 1000 * percentile(delays, 0.5), "ms")
    yield from _latencies(f"GET /jobs/{{id}} with watchers, {READS_PER_S // 4}/s", reads_s, None)
    closed_s, reads_s = asyncio.run(_slow_clients(target))
    yield _figure(f"{SLOW_CLIENTS} slow clients, the last one closed after", max(closed_s), "s", 15)
    yield from _latencies(f"GET /jobs/{{id}} with slow clients, {READS_PER_S // 4}/s", reads_s, 100)
    yield _figure("peak memory of the API process", target.memory_mb(), "MB", 300)


async def _watch(target: LoadedApi) -> tuple[list[float], list[float]]:
    """Seconds from each event's commit until the watcher of its job has it; latencies of concurrent reads."""
    written: dict[str, float] = {}
    delays: dict[str, float] = {}
    ready = asyncio.Semaphore(0)

    async def watch(job_id: str) -> None:
        connection = await target.server.connect()
        async for event in connection.events(target.server.request("GET", f"/jobs/{job_id}/events")):
            received, step = time.perf_counter(), _step(event)
            if step == STEPS:
                ready.release()
            elif step > STEPS:
                delays[job_id] = received
                break
        connection.writer.close()

    def write() -> None:
        for number, job_id in enumerate(random.Random(1).sample(target.running, RUNNING)):
            time.sleep(max(0.0, begin + number / WRITES_PER_S - time.perf_counter()))
            with target.database.write() as connection:
                append_event(connection, job_id, datetime.now(UTC), "metrics", {"step": STEPS + 1})
            written[job_id] = time.perf_counter()

    async with asyncio.TaskGroup() as tasks:
        for job_id in target.running:
            tasks.create_task(watch(job_id))
        for _ in target.running:
            await ready.acquire()
        begin = time.perf_counter()
        writing = asyncio.create_task(asyncio.to_thread(write))
        reads_s = await _read(target, RUNNING / WRITES_PER_S)
        await writing
    # The watcher may have the event before the writer thread has read the clock.
    return [max(0.0, delays[job_id] - written[job_id]) for job_id in target.running], reads_s


def _step(event: bytes) -> int:
    """The step of the event; 0 for a comment."""
    data = event.partition(b"data: ")[2].partition(b"\n")[0]
    return int(json.loads(data)["step"]) if data else 0


async def _slow_clients(target: LoadedApi) -> tuple[list[float], list[float]]:
    """Seconds until the API closes each slow client's connection; latencies of concurrent reads."""
    async with asyncio.TaskGroup() as tasks:
        slow = [tasks.create_task(_slow_client(target.api.port, *SLOW[number % 3])) for number in range(SLOW_CLIENTS)]
        reads_s = await _read(target, SECONDS + 2)
    return [task.result() for task in slow], reads_s


async def _slow_client(port: int, first: bytes, rest: bytes) -> float:
    """Seconds until the API closes the connection."""
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
    """Whether the API closes the connection within this time."""
    try:
        await asyncio.wait_for(reader.read(), within_s)
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


async def _read(target: LoadedApi, seconds: float) -> list[float]:
    """Latencies of reads at a quarter of READS_PER_S."""
    rate = READS_PER_S // 4
    request = target.server.request("GET", f"/jobs/{target.ids[0]}")
    return await open_loop(target.server, [request] * int(rate * seconds), rate, 200)


async def _post(server: Server, target: str, body: bytes) -> dict[str, Any]:
    connection = await server.connect()
    status, answer = await connection.send(server.request("POST", target, body))
    connection.writer.close()
    assert status == 201, answer
    stored: dict[str, Any] = json.loads(answer)
    return stored


def _store_jobs(database: Database, dataset_id: str, template: str) -> list[str]:
    """Stores JOBS copies of the job `template`, each with an event per step, and returns their ids."""
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
    yield _figure(f"{name}, median", 1000 * percentile(seconds, 0.5), "ms")


def _figure(name: str, value: float, unit: str, must: float | None = None) -> dict[str, Any]:
    return {"figure": name, "value": round(value, 2), "unit": unit, "must": must, "better": "lower"}
