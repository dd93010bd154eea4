from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest

from qlora_service.domain.webhooks import Endpoint
from qlora_service.errors import InvalidRequest, NoRoom, NotFound
from qlora_service.store.database import Database
from qlora_service.store.idempotency import Once, Replay
from qlora_service.store.webhooks import disable_endpoint
from qlora_service.webhooks.endpoints import MAX_ENDPOINTS, SAMPLE_JOB, Webhooks
from qlora_service.webhooks.sending import Sender
from tests.control_plane import START, database
from tests.receiver import Receiver, receiving

__all__ = ["database"]

TYPES = ["fine_tuning.job.succeeded", "fine_tuning.job.failed"]
PUBLIC = "https://told.example/"


@pytest.fixture
def webhooks(database: Database) -> Webhooks:
    """Everything has a public address, and nothing answers there."""
    return Webhooks(database, Sender(resolve=lambda *_: ["192.88.99.1"]), clock=lambda: START)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def test_endpoints_are_listed_changed_and_deleted(webhooks: Webhooks) -> None:
    made = [webhooks.create(f"number {number}", PUBLIC, [TYPES[0]] * 2) for number in range(3)]
    assert made[0].event_types == TYPES[:1]
    assert webhooks.list_endpoints() == made[::-1]
    assert webhooks.list_endpoints(before=made[2].id, limit=1) == [made[1]]
    changed = webhooks.update(made[0].id, name="other", event_types=TYPES)
    assert (changed.name, changed.url, changed.event_types, changed.secret) == ("other", PUBLIC, TYPES, made[0].secret)
    assert webhooks.get(made[0].id) == changed
    assert webhooks.update(made[0].id, url=PUBLIC + "more").url == PUBLIC + "more"
    webhooks.delete(made[0].id)
    assert webhooks.list_endpoints() == made[:0:-1]


def test_rotated_secret_is_a_new_one(webhooks: Webhooks) -> None:
    made = webhooks.create("told", PUBLIC, TYPES)
    rotated = webhooks.rotate_secret(made.id)
    assert rotated.secret != made.secret
    assert webhooks.get(made.id) == rotated
    assert rotated.secrets_at(START) == [rotated.secret]


def test_secret_of_before_may_stay_for_a_day(webhooks: Webhooks) -> None:
    made = webhooks.create("told", PUBLIC, TYPES)
    second = webhooks.rotate_secret(made.id, keep_old=True)
    assert second.secrets_at(START) == [second.secret, made.secret]
    assert second.secrets_at(START + timedelta(hours=24)) == [second.secret]
    assert webhooks.get(made.id) == second
    third = webhooks.rotate_secret(made.id, keep_old=True)
    assert third.secrets_at(START) == [third.secret, second.secret]
    last = webhooks.rotate_secret(made.id)
    assert last.secrets_at(START) == [last.secret]


def test_endpoint_that_was_disabled_is_told_again_once_it_is_changed(webhooks: Webhooks, database: Database) -> None:
    made = webhooks.create("told", PUBLIC, TYPES)
    with database.write() as connection:
        disable_endpoint(connection, made.id, START)
    assert webhooks.get(made.id).disabled_at == START
    assert webhooks.update(made.id).disabled_at is None


@pytest.mark.parametrize(
    ("changes", "location"),
    [
        ({"name": " "}, "/name"),
        ({"name": "a" * 65}, "/name"),
        ({"name": "a\nb"}, "/name"),
        ({"event_types": []}, "/event_types"),
        ({"event_types": ["batch.completed"]}, "/event_types"),
        ({"url": "http://told.example/"}, "/url"),
        ({"url": "https://user@told.example/"}, "/url"),
    ],
)
def test_what_cannot_be_used_is_refused_when_made_and_when_changed(
    webhooks: Webhooks, changes: dict[str, Any], location: str
) -> None:
    good: dict[str, Any] = {"name": "told", "url": PUBLIC, "event_types": TYPES}
    made = webhooks.create(**good)
    for action in (lambda: webhooks.create(**good | changes), lambda: webhooks.update(made.id, **changes)):
        with pytest.raises(InvalidRequest) as caught:
            action()
        assert caught.value.location == location
    assert webhooks.list_endpoints() == [made]


def test_private_address_is_refused_when_made_and_when_changed(database: Database, webhooks: Webhooks) -> None:
    made = webhooks.create("told", PUBLIC, TYPES)
    inside = Webhooks(database, Sender(resolve=lambda *_: ["10.0.0.1"]))
    for action in (lambda: inside.create("told", PUBLIC, TYPES), lambda: inside.update(made.id, url=PUBLIC)):
        with pytest.raises(InvalidRequest, match="not on the public internet"):
            action()


def test_only_so_many_endpoints_may_be(webhooks: Webhooks) -> None:
    for _ in range(MAX_ENDPOINTS):
        webhooks.create("told", PUBLIC, TYPES)
    with pytest.raises(NoRoom, match="delete one"):
        webhooks.create("told", PUBLIC, TYPES)
    assert webhooks.within("other").create("told", PUBLIC, TYPES).project == "other"


def test_another_projects_endpoint_is_not_there(webhooks: Webhooks) -> None:
    made = webhooks.create("told", PUBLIC, TYPES)
    other = webhooks.within("other")
    actions: list[Callable[[], object]] = [
        lambda: other.get(made.id),
        lambda: other.update(made.id, name="mine"),
        lambda: other.delete(made.id),
        lambda: other.rotate_secret(made.id),
        lambda: other.test(made.id, TYPES[0]),
        lambda: other.deliveries(made.id),
    ]
    for action in actions:
        with pytest.raises(NotFound, match=made.id) as caught:
            action()
        assert caught.value.location == "webhook_endpoint_id"
    assert other.list_endpoints() == []
    assert webhooks.get(made.id) == made


def test_sample_is_sent_once_and_logged(database: Database, receiver: Receiver) -> None:
    webhooks = Webhooks(database, Sender(private=True), clock=lambda: START)
    made = webhooks.create("told", receiver.url(), TYPES)
    receiver.answers = [418]
    for status in (418, 200):
        delivery = webhooks.test(made.id, "fine_tuning.job.failed")
        assert (delivery.last_status, delivery.attempts, delivery.due_at) == (status, 1, None)
        assert (delivery.delivered_at is not None) == (status == 200)
        assert webhooks.deliveries(made.id)[0] == delivery
    assert delivery.body["data"] == {"id": SAMPLE_JOB}
    assert len(receiver.received) == 2


def test_sample_that_nobody_takes_says_why(database: Database, receiver: Receiver) -> None:
    webhooks = Webhooks(database, Sender(private=True))
    made = webhooks.create("told", "http://127.0.0.1:1/", TYPES)
    with pytest.raises(InvalidRequest, match="did not take the message: Connection refused"):
        webhooks.test(made.id, TYPES[0])
    with pytest.raises(InvalidRequest, match=r"batch\.completed"):
        webhooks.test(made.id, "batch.completed")
    (delivery,) = webhooks.deliveries(made.id)
    assert (delivery.attempts, delivery.due_at, delivery.last_status, delivery.delivered_at) == (1, None, None, None)
    assert "Connection refused" in (delivery.last_error or "")


def test_request_that_is_repeated_makes_one_endpoint(webhooks: Webhooks) -> None:
    once: Once[Endpoint] = Once("key", "local", "f" * 64, lambda endpoint: {"id": endpoint.id})
    made = webhooks.create("told", PUBLIC, TYPES, once=once)
    with pytest.raises(Replay) as caught:
        webhooks.create("told", PUBLIC, TYPES, once=once)
    assert caught.value.answer == {"id": made.id}
    assert webhooks.list_endpoints() == [made]
