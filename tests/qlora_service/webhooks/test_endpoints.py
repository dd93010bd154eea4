from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest

from qlora_service.domain.webhooks import Endpoint
from qlora_service.errors import InvalidRequest, NotFound, ObjectLimitReached
from qlora_service.store.database import Database
from qlora_service.store.idempotency import Once, Replay
from qlora_service.store.webhooks import disable_endpoint
from qlora_service.webhooks.endpoints import MAX_ENDPOINTS, SAMPLE_JOB, Webhooks
from qlora_service.webhooks.sending import Sender
from tests.control_plane import START, database
from tests.receiver import Receiver, receiving

__all__ = ["database"]

TYPES = ["fine_tuning.job.succeeded", "fine_tuning.job.failed"]
PUBLIC = "https://receiver.example/"


@pytest.fixture
def webhooks(database: Database) -> Webhooks:
    """Every host resolves to a public address, at which no server listens."""
    return Webhooks(database, Sender(resolve=lambda *_: ["192.88.99.1"]), clock=lambda: START)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def test_endpoints_are_listed_changed_and_deleted(webhooks: Webhooks) -> None:
    created = [webhooks.create(f"number {number}", PUBLIC, [TYPES[0]] * 2) for number in range(3)]
    assert created[0].event_types == TYPES[:1]
    assert webhooks.list_endpoints() == created[::-1]
    assert webhooks.list_endpoints(before=created[2].id, limit=1) == [created[1]]
    changed = webhooks.update(created[0].id, name="other", event_types=TYPES)
    assert (changed.name, changed.url, changed.event_types, changed.secret) == (
        "other",
        PUBLIC,
        TYPES,
        created[0].secret,
    )
    assert webhooks.get(created[0].id) == changed
    assert webhooks.update(created[0].id, url=PUBLIC + "more").url == PUBLIC + "more"
    webhooks.delete(created[0].id)
    assert webhooks.list_endpoints() == created[:0:-1]


def test_rotated_secret_is_a_new_one(webhooks: Webhooks) -> None:
    created = webhooks.create("receiver", PUBLIC, TYPES)
    rotated = webhooks.rotate_secret(created.id)
    assert rotated.secret != created.secret
    assert webhooks.get(created.id) == rotated
    assert rotated.secrets_at(START) == [rotated.secret]


def test_old_secret_can_be_kept_for_a_day(webhooks: Webhooks) -> None:
    created = webhooks.create("receiver", PUBLIC, TYPES)
    second = webhooks.rotate_secret(created.id, keep_old=True)
    assert second.secrets_at(START) == [second.secret, created.secret]
    assert second.secrets_at(START + timedelta(hours=24)) == [second.secret]
    assert webhooks.get(created.id) == second
    third = webhooks.rotate_secret(created.id, keep_old=True)
    assert third.secrets_at(START) == [third.secret, second.secret]
    last = webhooks.rotate_secret(created.id)
    assert last.secrets_at(START) == [last.secret]


def test_change_enables_a_disabled_endpoint(webhooks: Webhooks, database: Database) -> None:
    created = webhooks.create("receiver", PUBLIC, TYPES)
    with database.write() as connection:
        disable_endpoint(connection, created.id, START)
    assert webhooks.get(created.id).disabled_at == START
    assert webhooks.update(created.id).disabled_at is None


@pytest.mark.parametrize(
    ("changes", "location"),
    [
        ({"name": " "}, "/name"),
        ({"name": "a" * 65}, "/name"),
        ({"name": "a\nb"}, "/name"),
        ({"event_types": []}, "/event_types"),
        ({"event_types": ["batch.completed"]}, "/event_types"),
        ({"url": "http://receiver.example/"}, "/url"),
        ({"url": "https://user@receiver.example/"}, "/url"),
    ],
)
def test_invalid_values_are_refused_on_create_and_update(
    webhooks: Webhooks, changes: dict[str, Any], location: str
) -> None:
    valid: dict[str, Any] = {"name": "receiver", "url": PUBLIC, "event_types": TYPES}
    created = webhooks.create(**valid)
    for action in (lambda: webhooks.create(**valid | changes), lambda: webhooks.update(created.id, **changes)):
        with pytest.raises(InvalidRequest) as caught:
            action()
        assert caught.value.location == location
    assert webhooks.list_endpoints() == [created]


def test_private_address_is_refused_on_create_and_update(database: Database, webhooks: Webhooks) -> None:
    created = webhooks.create("receiver", PUBLIC, TYPES)
    private = Webhooks(database, Sender(resolve=lambda *_: ["10.0.0.1"]))
    for action in (lambda: private.create("receiver", PUBLIC, TYPES), lambda: private.update(created.id, url=PUBLIC)):
        with pytest.raises(InvalidRequest, match="not on the public internet"):
            action()


def test_endpoints_of_a_project_are_limited(webhooks: Webhooks) -> None:
    for _ in range(MAX_ENDPOINTS):
        webhooks.create("receiver", PUBLIC, TYPES)
    with pytest.raises(ObjectLimitReached, match="delete or change one"):
        webhooks.create("receiver", PUBLIC, TYPES)
    assert webhooks.within("other").create("receiver", PUBLIC, TYPES).project == "other"


def test_endpoint_of_another_project_is_not_found(webhooks: Webhooks) -> None:
    created = webhooks.create("receiver", PUBLIC, TYPES)
    other = webhooks.within("other")
    actions: list[Callable[[], object]] = [
        lambda: other.get(created.id),
        lambda: other.update(created.id, name="mine"),
        lambda: other.delete(created.id),
        lambda: other.rotate_secret(created.id),
        lambda: other.test(created.id, TYPES[0]),
        lambda: other.deliveries(created.id),
    ]
    for action in actions:
        with pytest.raises(NotFound, match=created.id) as caught:
            action()
        assert caught.value.location == "webhook_endpoint_id"
    assert other.list_endpoints() == []
    assert webhooks.get(created.id) == created


def test_sample_event_is_sent_once_and_logged(database: Database, receiver: Receiver) -> None:
    webhooks = Webhooks(database, Sender(private=True), clock=lambda: START)
    created = webhooks.create("receiver", receiver.url(), TYPES)
    receiver.answers = [418]
    for status in (418, 200):
        delivery = webhooks.test(created.id, "fine_tuning.job.failed")
        assert (delivery.last_status, delivery.attempts, delivery.due_at) == (status, 1, None)
        assert (delivery.delivered_at is not None) == (status == 200)
        assert webhooks.deliveries(created.id)[0] == delivery
    assert delivery.body["data"] == {"id": SAMPLE_JOB}
    assert len(receiver.received) == 2


def test_refused_sample_event_reports_the_reason(database: Database, receiver: Receiver) -> None:
    webhooks = Webhooks(database, Sender(private=True))
    created = webhooks.create("receiver", "http://127.0.0.1:1/", TYPES)
    with pytest.raises(InvalidRequest, match="did not accept the message: Connection refused"):
        webhooks.test(created.id, TYPES[0])
    with pytest.raises(InvalidRequest, match=r"batch\.completed"):
        webhooks.test(created.id, "batch.completed")
    (delivery,) = webhooks.deliveries(created.id)
    assert (delivery.attempts, delivery.due_at, delivery.last_status, delivery.delivered_at) == (1, None, None, None)
    assert "Connection refused" in (delivery.last_error or "")


def test_repeated_request_creates_one_endpoint(webhooks: Webhooks) -> None:
    once: Once[Endpoint] = Once("key", "local", "f" * 64, lambda endpoint: {"id": endpoint.id})
    created = webhooks.create("receiver", PUBLIC, TYPES, once=once)
    with pytest.raises(Replay) as caught:
        webhooks.create("receiver", PUBLIC, TYPES, once=once)
    assert caught.value.answer == {"id": created.id}
    assert webhooks.list_endpoints() == [created]
