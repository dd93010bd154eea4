"""Concurrent requests with the same idempotency keys to an API that is killed repeatedly: one job per key.

python -m tests.chaos.idempotency 1000
"""

from __future__ import annotations

import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2

from qlora_service.models.catalog.catalog import Catalog
from tests.running_api import RunningApi
from tests.tiny_model import build_tiny_model

CONCURRENT_KEYS = 10
ROWS = [{"prompt": f"{n} plus one is", "completion": f" {n + 1}."} for n in range(4)]

# Kills the API after one in eight commits, before it answers.
DIES_AFTER_COMMIT = """
import os, random, signal, threading
from contextlib import contextmanager
from qlora_service.store.database import Database

committed = Database.write

@contextmanager
def write(self):
    with committed(self) as connection:
        yield connection
    # Only in requests: the main thread runs the start.
    if threading.current_thread() is not threading.main_thread() and random.random() < 1 / 8:
        os.kill(os.getpid(), signal.SIGKILL)

Database.write = write
"""


@dataclass(frozen=True)
class Storm:
    """Outcome of the requests: correct if `jobs` equals `keys`, and `wrong_keys` and `unequal_keys` are empty."""

    keys: int
    jobs: int
    wrong_keys: list[str]
    """Keys with no job, or with several"""
    unequal_keys: list[str]
    """Keys with different answers, or with an error"""
    replayed: int
    """Number of repeated answers"""
    kills: int
    seconds: float


def storm(data_dir: Path, *, keys: int, clients: int = 20, seed: int = 0) -> Storm:
    """Posts a job with every key from `clients` clients at once, while the API dies after commits and at random times.

    The catalog under `data_dir` has the model `tiny`.
    """
    started = time.monotonic()
    names = [f"key-{seed}-{number}" for number in range(keys)]
    answers: dict[str, list[httpx2.Response]] = {}
    with RunningApi(data_dir, DIES_AFTER_COMMIT) as api, _client(api.url, CONCURRENT_KEYS * clients) as http:
        is_up, ended = threading.Event(), threading.Event()
        killing = _killing(api, random.Random(seed), is_up, ended)
        with ThreadPoolExecutor(CONCURRENT_KEYS * clients) as pool, killing as kills:
            for first in range(0, keys, CONCURRENT_KEYS):
                posted = {
                    name: [pool.submit(_post_until_answered, http, name, is_up, ended) for _ in range(clients)]
                    for name in names[first : first + CONCURRENT_KEYS]
                }
                answers |= {name: [future.result() for future in futures] for name, futures in posted.items()}
        jobs = Counter(_job_names(http))
    bodies = {name: {(answer.status_code, answer.text) for answer in same} for name, same in answers.items()}
    return Storm(
        keys=keys,
        jobs=jobs.total(),
        wrong_keys=[name for name in names if jobs[name] != 1],
        unequal_keys=[name for name in names if len(bodies[name]) != 1 or {s for s, _ in bodies[name]} != {201}],
        replayed=sum("Idempotent-Replayed" in answer.headers for same in answers.values() for answer in same),
        kills=len(kills),
        seconds=round(time.monotonic() - started, 1),
    )


def main(keys: int) -> int:
    """Prints the outcome of a storm as JSON; 1 with a fault."""
    with tempfile.TemporaryDirectory() as directory:
        data_dir = Path(directory)
        Catalog(data_dir / "models").import_model("tiny", build_tiny_model(data_dir / "source"))
        outcome = storm(data_dir, keys=keys)
    print(json.dumps(asdict(outcome)))
    return int(outcome.jobs != keys or bool(outcome.wrong_keys or outcome.unequal_keys))


def _client(url: str, connections: int) -> httpx2.Client:
    limits = httpx2.Limits(max_connections=connections)
    return httpx2.Client(base_url=url, timeout=60, limits=limits, trust_env=False)


def _post_until_answered(
    http: httpx2.Client, name: str, is_up: threading.Event, ended: threading.Event
) -> httpx2.Response:
    """The answer to a job with this key. Raises: AssertionError, once nothing restarts the API any more."""
    # Plain prompts need no process that renders a template, so that the API answers often enough between kills.
    training = {"max_seq_len_tokens": 64, "prompt_format": "plain"}
    spec = {"base_model": "tiny", "name": name, "dataset": {"rows": ROWS}, "training": training}
    while not ended.is_set():
        # Requests while the API starts would take half of the processor from it.
        if not is_up.wait(120):
            raise AssertionError("the API has not restarted within 120 s")
        time.sleep(random.uniform(0, 0.5))
        try:
            answer = http.post("/jobs", json=spec, headers={"Idempotency-Key": name})
            if answer.status_code != httpx2.codes.SERVICE_UNAVAILABLE:
                return answer
        except httpx2.TransportError:
            time.sleep(0.1)
    raise AssertionError("the storm has ended before the answer")


@contextmanager
def _killing(
    api: RunningApi, generator: random.Random, is_up: threading.Event, ended: threading.Event
) -> Iterator[list[float]]:
    """The times at which the API died, while a thread kills it at random times and restarts it whenever it is dead.

    It lives about as long as it takes to start, so that slow machines get as much work done between kills.
    """
    deaths: list[float] = []

    def kill() -> None:
        started = time.monotonic()
        while not ended.is_set():
            # Few are killed while they start; otherwise a slow machine would answer no request.
            while generator.random() > 0.01 and not (ended.is_set() or api.ended() or api.answers()):
                time.sleep(0.05)
            is_up.set()
            start_s = time.monotonic() - started
            deadline = time.monotonic() + generator.uniform(0, 2 * start_s)
            while time.monotonic() < deadline and not ended.is_set() and not api.ended():
                time.sleep(0.01)
            if ended.is_set() and not api.ended():
                return
            is_up.clear()
            api.stop(signal.SIGKILL)
            deaths.append(time.monotonic())
            started = time.monotonic()
            api.launch()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield deaths
    finally:
        ended.set()
        killer.join()
        is_up.set()  # ends the wait of the clients
        while not api.answers():  # the last kill may have been just now
            if api.ended():
                api.launch()
            time.sleep(0.05)


def _job_names(http: httpx2.Client) -> Iterator[str]:
    query: dict[str, Any] = {"limit": 100}
    while True:
        page = http.get("/jobs", params=query).json()
        yield from (job["name"] for job in page["data"])
        if page["next"] is None:
            return
        query["after"] = page["next"]


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
