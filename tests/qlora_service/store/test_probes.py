from __future__ import annotations

from datetime import timedelta
from typing import Any

from qlora_service.store import probes
from qlora_service.store.database import Database
from qlora_service.store.probes import UNTAKEN, VALID, Probe
from tests.control_plane import START, each_database

__all__ = ["each_database"]

CPU, CUDA = {"device": "cpu", "longest_tokens": 64}, {"device": "cuda", "longest_tokens": 64}
FIGURES = {"tokens_per_second": 100.0}


def ask(database: Database, key: str, request: dict[str, Any] = CPU, days: float = 0) -> None:
    with database.write() as connection:
        probes.ask_for(connection, key, request, START + timedelta(days=days))


def take(database: Database, worker: str, device: str = "cpu") -> str | None:
    with database.write() as connection:
        wanted = probes.is_wanted(connection, worker, device)
        found = probes.take_probe(connection, worker, device)
    assert wanted == (found is not None)
    return None if found is None else found.key


def finish(database: Database, key: str, result: dict[str, Any]) -> bool:
    with database.write() as connection:
        return probes.finish_probe(connection, key, result, START)


def find(database: Database, key: str) -> Probe | None:
    with database.read() as connection:
        return probes.find_probe(connection, key)


def test_asking_twice_is_asking_once(database: Database) -> None:
    ask(database, "a")
    ask(database, "a", CUDA, days=1)
    assert find(database, "a") == Probe("a", CPU, START, None)
    assert find(database, "b") is None


def test_probes_are_taken_oldest_first_by_one_worker_each_on_its_kind_of_device(database: Database) -> None:
    ask(database, "younger", days=1)
    ask(database, "older")
    ask(database, "card", CUDA)
    assert take(database, "one") == "older"
    assert take(database, "other") == "younger"
    assert take(database, "third") is None
    assert take(database, "third", "cuda") == "card"


def test_what_a_dead_worker_left_is_taken_by_the_next_one_of_its_slot(database: Database) -> None:
    ask(database, "older")
    ask(database, "younger", days=1)
    assert take(database, "one") == "older"
    assert take(database, "one") == "older"


def test_what_was_given_back_is_anybodys(database: Database) -> None:
    ask(database, "a")
    assert take(database, "one") == "a"
    with database.write() as connection:
        probes.give_back(connection, "one")
    assert take(database, "other") == "a"


def test_result_ends_a_probe_and_is_the_first_one_told(database: Database) -> None:
    ask(database, "a")
    assert take(database, "one") == "a"
    assert finish(database, "a", FIGURES)
    assert not finish(database, "a", {"error": "too late"})
    assert not finish(database, "unknown", FIGURES)
    found = find(database, "a")
    assert found is not None
    assert found.result == FIGURES
    assert take(database, "one") is None


def test_old_probes_are_dropped_when_nobody_took_them_and_results_when_nobody_should_believe_them(
    database: Database,
) -> None:
    for key in ("waits", "taken", "failed", "timed"):
        ask(database, key)
    with database.write() as connection:
        probes.finish_probe(connection, "failed", {"error": "it crashed"}, START)
        probes.finish_probe(connection, "timed", FIGURES, START)
    assert take(database, "one") == "taken"

    def left(age: timedelta) -> set[str]:
        with database.write() as connection:
            probes.drop_old(connection, START + age)
        return {key for key in ("waits", "taken", "failed", "timed") if find(database, key) is not None}

    assert left(UNTAKEN) == {"waits", "taken", "failed", "timed"}
    assert left(UNTAKEN + timedelta(seconds=1)) == {"taken", "timed"}
    assert left(VALID + timedelta(seconds=1)) == set()
