from __future__ import annotations

import threading
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from qlora_service.errors import Conflict
from qlora_service.store.database import Database
from qlora_service.store.idempotency import (
    KEY_LIFETIME,
    MAX_DELETED_PER_REQUEST,
    RETRY_WINDOW,
    Once,
    Replay,
    RequestAttempt,
    keep,
    recall,
    reserve,
)
from qlora_service.store.tables import idempotency_keys
from tests.control_plane import START, stored_rows


def once(key: str = "k", *, project: str = "local", fingerprint: str = "f") -> Once[int]:
    return Once(key, project, fingerprint, lambda result: {"status": 201, "body": {"result": result}})


def act(database: Database, request: Once[int], result: int = 1, after: timedelta = timedelta()) -> None:
    with database.write() as connection:
        reserve(connection, request, START + after)
        keep(connection, request, result)


def kept_keys(database: Database) -> list[str]:
    with database.read() as connection:
        return list(connection.execute(sa.select(idempotency_keys.c.key).order_by("key")).scalars())


def test_request_under_a_known_key_gets_the_first_answer(database: Database) -> None:
    act(database, once(), result=1)
    with pytest.raises(Replay) as caught:
        act(database, once(), result=2)
    assert caught.value.answer == {"status": 201, "body": {"result": 1}}
    with pytest.raises(Replay) as recalled:
        recall(database, once())
    assert recalled.value.answer == caught.value.answer


def test_another_request_under_a_known_key_is_a_conflict(database: Database) -> None:
    act(database, once())
    with pytest.raises(Conflict, match=r"'k' was used for another request.*send a new key"):
        act(database, once(fingerprint="g"))
    with pytest.raises(Conflict):
        recall(database, once(fingerprint="g"))


def test_projects_do_not_share_keys(database: Database) -> None:
    act(database, once())
    act(database, once(project="other", fingerprint="g"))
    assert [row[:2] for row in stored_rows(database)["idempotency_keys"]] == [("local", "k"), ("other", "k")]
    recall(database, once(project="third"))


def test_key_of_a_failed_action_can_be_used_again(database: Database) -> None:
    def fail(_: int) -> dict[str, Any]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        act(database, Once("k", "local", "f", fail))
    assert kept_keys(database) == []
    act(database, once(fingerprint="g"))


def test_one_of_many_concurrent_requests_does_the_work(database: Database) -> None:
    start, outcomes = threading.Barrier(8), list[Any]()

    def work(number: int) -> None:
        start.wait()
        try:
            act(database, once(), number)
            outcomes.append(number)
        except Replay as replay:
            outcomes.append(replay.answer["body"]["result"])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 8
    assert len(set(outcomes)) == 1


def test_old_keys_are_deleted_a_few_at_a_time(database: Database) -> None:
    for number in range(MAX_DELETED_PER_REQUEST + 1):
        act(database, once(f"old {number:03}"), after=timedelta(seconds=number))
    act(database, once("new"), after=KEY_LIFETIME)
    assert len(kept_keys(database)) == MAX_DELETED_PER_REQUEST + 2
    act(database, once("newer"), after=KEY_LIFETIME + timedelta(days=1))
    assert kept_keys(database) == ["new", "newer", f"old {MAX_DELETED_PER_REQUEST:03}"]


# --- clients that number their attempts instead of sending a key


def attempt(retry: bool, after: timedelta = timedelta()) -> Once[int]:
    """The same request in every test, sent for the first time or as a retry."""
    return replace(once(), attempt=RequestAttempt(START + after, is_retry=retry))


def answer_of(database: Database, request: Once[int], result: int, after: timedelta = timedelta()) -> int:
    """The result that the client receives: this one, or that of the first request."""
    try:
        act(database, request, result, after)
    except Replay as replay:
        return int(replay.answer["body"]["result"])
    return result


def test_a_retry_gets_the_answer_of_the_first_attempt(database: Database) -> None:
    assert answer_of(database, attempt(retry=False), 1) == 1
    later = timedelta(seconds=2)
    assert answer_of(database, attempt(True, later), 2, later) == 1
    with pytest.raises(Replay):
        recall(database, attempt(True, later))


def test_first_attempts_are_separate_requests(database: Database) -> None:
    assert [answer_of(database, attempt(retry=False), result) for result in (1, 2)] == [1, 2]
    assert answer_of(database, attempt(retry=True), 3) == 2


def test_a_retry_whose_first_attempt_did_nothing_does_the_work(database: Database) -> None:
    assert answer_of(database, attempt(retry=True), 1) == 1
    assert answer_of(database, attempt(retry=True), 2) == 1


def test_a_first_attempt_that_arrives_after_its_retry_does_nothing(database: Database) -> None:
    soon = timedelta(seconds=5)
    assert answer_of(database, attempt(True, soon), 1, soon) == 1
    assert answer_of(database, attempt(retry=False), 2, 2 * soon) == 1
    assert answer_of(database, attempt(False, 3 * soon), 3, 3 * soon) == 3


def test_a_late_retry_is_a_new_request(database: Database) -> None:
    assert answer_of(database, attempt(retry=False), 1) == 1
    late = RETRY_WINDOW + timedelta(seconds=1)
    assert answer_of(database, attempt(True, late), 2, late) == 2
