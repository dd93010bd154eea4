"""Many clients post under few keys to an API that is killed all the time: every key must make exactly one job.

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

KEYS_TOGETHER = 10
ROWS = [{"prompt": f"{n} plus one is", "completion": f" {n + 1}."} for n in range(4)]

# The answer to a request whose work is on disk never leaves, one time in eight.
DIES_AFTER_COMMIT = """
import os, random, signal, threading
from contextlib import contextmanager
from qlora_service.store.database import Database

committed = Database.write

@contextmanager
def write(self):
    with committed(self) as connection:
        yield connection
    # Requests are worked on by other threads than the start.
    if threading.current_thread() is not threading.main_thread() and random.random() < 1 / 8:
        os.kill(os.getpid(), signal.SIGKILL)

Database.write = write
"""


@dataclass(frozen=True)
class Storm:
    """What came of it. Nothing went wrong when `jobs` is `keys`, and `wrong_keys` and `unequal_keys` are empty."""

    keys: int
    jobs: int
    wrong_keys: list[str]
    """Keys with no job, or with several."""
    unequal_keys: list[str]
    """Keys whose clients got answers that differ."""
    replayed: int
    """Answers that were given before."""
    kills: int
    seconds: float


def storm(data_dir: Path, *, keys: int, clients: int = 20, seed: int = 0) -> Storm:
    """Posts one job per key from each of `clients` at once; the API dies after commits, and at random times besides.

    The catalog under `data_dir` holds the model `tiny`.
    """
    started = time.monotonic()
    names = [f"key-{seed}-{number}" for number in range(keys)]
    answers: dict[str, list[httpx2.Response]] = {}
    with RunningApi(data_dir, DIES_AFTER_COMMIT) as api, _client(api.url, KEYS_TOGETHER * clients) as http:
        is_up = threading.Event()
        with ThreadPoolExecutor(KEYS_TOGETHER * clients) as pool, _dying(api, random.Random(seed), is_up) as kills:
            for first in range(0, keys, KEYS_TOGETHER):
                posted = {
                    name: [pool.submit(_post_until_answered, http, name, is_up) for _ in range(clients)]
                    for name in names[first : first + KEYS_TOGETHER]
                }
                answers |= {name: [future.result() for future in futures] for name, futures in posted.items()}
        jobs = Counter(_job_names(http))
    bodies = {name: {(answer.status_code, answer.text) for answer in given} for name, given in answers.items()}
    return Storm(
        keys=keys,
        jobs=jobs.total(),
        wrong_keys=[name for name in names if jobs[name] != 1],
        unequal_keys=[name for name in names if len(bodies[name]) != 1 or {s for s, _ in bodies[name]} != {201}],
        replayed=sum("Idempotent-Replayed" in answer.headers for given in answers.values() for answer in given),
        kills=len(kills),
        seconds=round(time.monotonic() - started, 1),
    )


def _client(url: str, connections: int) -> httpx2.Client:
    limits = httpx2.Limits(max_connections=connections)
    return httpx2.Client(base_url=url, timeout=60, limits=limits, trust_env=False)


def _post_until_answered(http: httpx2.Client, name: str, is_up: threading.Event) -> httpx2.Response:
    spec = {"base_model": "tiny", "name": name, "dataset": {"rows": ROWS}, "training": {"max_seq_len_tokens": 64}}
    while True:
        # As clients do who are many: while the API starts, they would otherwise take half of the processor from it.
        if not is_up.wait(120):
            raise AssertionError("the API does not come up again")
        time.sleep(random.uniform(0, 0.5))
        try:
            answer = http.post("/jobs", json=spec, headers={"Idempotency-Key": name})
            if answer.status_code != httpx2.codes.SERVICE_UNAVAILABLE:
                return answer
        except httpx2.TransportError:
            time.sleep(0.1)


@contextmanager
def _dying(api: RunningApi, chance: random.Random, is_up: threading.Event) -> Iterator[list[float]]:
    """Kills the API at random times, and starts it again whenever it is dead; the times of its deaths.

    It lives about as long as it takes to start, so that on a slow machine as much is done in its life.
    """
    over, deaths = threading.Event(), list[float]()

    def kill() -> None:
        started = time.monotonic()
        while not over.is_set():
            # Some die while they start; if on a slow machine all did, nobody would ever be answered.
            while chance.random() > 0.01 and not (over.is_set() or api.ended() or api.answers()):
                time.sleep(0.05)
            is_up.set()
            took_s = time.monotonic() - started
            deadline = time.monotonic() + chance.uniform(0, 2 * took_s)
            while time.monotonic() < deadline and not over.is_set() and not api.ended():
                time.sleep(0.01)
            if over.is_set() and not api.ended():
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
        over.set()
        killer.join()
        while not api.answers():  # it may just have been killed
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


def main(keys: int) -> int:
    """Prints what came of a storm; 1 when something went wrong."""
    with tempfile.TemporaryDirectory() as directory:
        data_dir = Path(directory)
        Catalog(data_dir / "models").import_model("tiny", build_tiny_model(data_dir / "source"))
        outcome = storm(data_dir, keys=keys)
    print(json.dumps(asdict(outcome)))
    return int(outcome.jobs != keys or bool(outcome.wrong_keys or outcome.unequal_keys))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
