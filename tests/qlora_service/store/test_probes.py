from __future__ import annotations

from datetime import timedelta
from typing import Any

from qlora_service.store import probes
from qlora_service.store.database import Database
from qlora_service.store.probes import PENDING_LIFETIME, RESULT_LIFETIME, Probe
from tests.control_plane import START, each_database

__all__ = ["each_database"]

CPU, CUDA = {"device": "cpu", "longest_tokens": 64}, {"device": "cuda", "longest_tokens": 64}
FIGURES = {"tokens_per_second": 100.0}


def request_probe(database: Database, key: str, request: dict[str, Any] = CPU, days: float = 0) -> None:
    with database.write() as connection:
        probes.insert_probe(connection, key, request, START + timedelta(days=days))


def take(database: Database, worker: str, device: str = "cpu") -> str | None:
    with database.write() as connection:
        is_wanted = probes.has_probe(connection, worker, device)
        probe = probes.take_probe(connection, worker, device)
    assert is_wanted == (probe is not None)
    return None if probe is None else probe.key


def finish(database: Database, key: str, result: dict[str, Any]) -> bool:
    with database.write() as connection:
        return probes.finish_probe(connection, key, result, START)


def find(database: Database, key: str) -> Probe | None:
    with database.read() as connection:
        return probes.find_probe(connection, key)


def test_second_request_with_the_same_key_changes_nothing(database: Database) -> None:
    request_probe(database, "a")
    request_probe(database, "a", CUDA, days=1)
    assert find(database, "a") == Probe("a", CPU, START, None)
    assert find(database, "b") is None


def test_probes_for_a_device_are_taken_oldest_first_each_by_one_worker(database: Database) -> None:
    request_probe(database, "younger", days=1)
    request_probe(database, "older")
    request_probe(database, "gpu", CUDA)
    assert take(database, "one") == "older"
    assert take(database, "other") == "younger"
    assert take(database, "third") is None
    assert take(database, "third", "cuda") == "gpu"


def test_probe_of_a_dead_worker_is_taken_by_the_next_worker_of_its_slot(database: Database) -> None:
    request_probe(database, "older")
    request_probe(database, "younger", days=1)
    assert take(database, "one") == "older"
    assert take(database, "one") == "older"


def test_released_probe_is_taken_by_any_worker(database: Database) -> None:
    request_probe(database, "a")
    assert take(database, "one") == "a"
    with database.write() as connection:
        probes.release_probe(connection, "one")
    assert take(database, "other") == "a"


def test_first_result_ends_a_probe(database: Database) -> None:
    request_probe(database, "a")
    assert take(database, "one") == "a"
    assert finish(database, "a", FIGURES)
    assert not finish(database, "a", {"error": "too late"})
    assert not finish(database, "unknown", FIGURES)
    probe = find(database, "a")
    assert probe is not None
    assert probe.result == FIGURES
    assert take(database, "one") is None


def test_untaken_probes_failures_and_results_are_deleted_after_their_lifetimes(database: Database) -> None:
    for key in ("waits", "taken", "failed", "timed"):
        request_probe(database, key)
    with database.write() as connection:
        probes.finish_probe(connection, "failed", {"error": "it crashed"}, START)
        probes.finish_probe(connection, "timed", FIGURES, START)
    assert take(database, "one") == "taken"

    def left(age: timedelta) -> set[str]:
        with database.write() as connection:
            probes.delete_expired(connection, START + age)
        return {key for key in ("waits", "taken", "failed", "timed") if find(database, key) is not None}

    assert left(PENDING_LIFETIME) == {"waits", "taken", "failed", "timed"}
    assert left(PENDING_LIFETIME + timedelta(seconds=1)) == {"taken", "timed"}
    assert left(RESULT_LIFETIME + timedelta(seconds=1)) == set()
