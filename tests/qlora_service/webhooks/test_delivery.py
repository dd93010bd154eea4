from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta

import pytest
from structlog.testing import capture_logs

from qlora_service.domain.ids import new_id
from qlora_service.domain.jobs import JobStatus
from qlora_service.domain.webhooks import EVENT_TYPES, Delivery, Endpoint
from qlora_service.queue.queue import Queue
from qlora_service.store.database import Database
from qlora_service.store.webhooks import (
    get_endpoint,
    insert_end_deliveries,
    insert_endpoint,
    list_deliveries,
    update_endpoint,
)
from qlora_service.webhooks.delivery import JITTER, MAX_CONCURRENT, RETRY_DELAYS, Deliverer
from qlora_service.webhooks.sending import Sender
from qlora_service.webhooks.signing import new_secret, signed_headers
from tests.control_plane import START, SteppedClock, add_job, clock, database, queue
from tests.receiver import Receiver, receiving

__all__ = ["clock", "database", "queue"]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def endpoint(database: Database, receiver: Receiver) -> Endpoint:
    types = list(EVENT_TYPES.values())
    endpoint = Endpoint(new_id("wh"), "local", "receiver", receiver.url(), types, new_secret(), START)
    with database.write() as connection:
        insert_endpoint(connection, endpoint)
    return endpoint


@pytest.fixture
def end_job(database: Database, endpoint: Endpoint, clock: SteppedClock) -> Callable[[], str]:
    """Creates a job that has succeeded, and returns its id."""

    def end() -> str:
        job_id = add_job(database)
        with database.write() as connection:
            insert_end_deliveries(connection, job_id, JobStatus.SUCCEEDED, clock())
        return job_id

    return end


@pytest.fixture
def deliverer(database: Database, clock: SteppedClock) -> Deliverer:
    return Deliverer(database, Sender(private=True), clock=clock)


def deliver(deliverer: Deliverer) -> int:
    """The number of messages sent; all are recorded on return."""
    threads = deliverer.deliver_due()
    for thread in threads:
        thread.join()
    return len(threads)


def deliveries_to(endpoint: Endpoint, database: Database) -> list[Delivery]:
    """The deliveries to the endpoint, oldest first."""
    with database.read() as connection:
        return list_deliveries(connection, endpoint.id, before=None, limit=100)[::-1]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_end_of_a_job_is_delivered_signed_and_once(
    database: Database, queue: Queue, receiver: Receiver, endpoint: Endpoint, deliverer: Deliverer
) -> None:
    job_id = add_job(database)
    claimed = queue.claim("worker")
    assert claimed is not None
    queue.succeed(claimed[0], {"attempt": 1})
    assert deliver(deliverer) == 1
    (received,) = receiver.received
    event = json.loads(received.body)
    assert event == {
        "id": event["id"],
        "object": "event",
        "created_at": int(START.timestamp()),
        "type": "fine_tuning.job.succeeded",
        "data": {"id": job_id},
    }
    signed = signed_headers([endpoint.secret], event["id"], int(START.timestamp()), received.body)
    assert signed.items() <= received.headers.items()
    (delivery,) = deliveries_to(endpoint, database)
    assert (delivery.delivered_at, delivery.due_at, delivery.last_status) == (START, None, 200)
    assert deliver(deliverer) == 0


def test_old_secret_signs_until_it_expires(
    database: Database,
    receiver: Receiver,
    endpoint: Endpoint,
    deliverer: Deliverer,
    clock: SteppedClock,
    end_job: Callable[[], str],
) -> None:
    with database.write() as connection:
        until = START + timedelta(hours=24)
        update_endpoint(connection, endpoint.id, old_secret=(old := new_secret()), old_secret_until=until)
    for wait_s, signers in ((0, [endpoint.secret, old]), (86_399, [endpoint.secret, old]), (1, [endpoint.secret])):
        clock.advance(wait_s)
        end_job()
        assert deliver(deliverer) == 1
        received = receiver.received[-1]
        headers = received.headers
        message_id, timestamp = headers["webhook-id"], int(headers["webhook-timestamp"])
        assert signed_headers(signers, message_id, timestamp, received.body).items() <= headers.items()


def test_failed_delivery_is_retried_under_its_id(
    database: Database,
    receiver: Receiver,
    endpoint: Endpoint,
    deliverer: Deliverer,
    clock: SteppedClock,
    end_job: Callable[[], str],
) -> None:
    receiver.answers = [500, 302]
    end_job()
    assert deliver(deliverer) == 1
    (delivery,) = deliveries_to(endpoint, database)
    assert (delivery.attempts, delivery.last_status, delivery.delivered_at) == (1, 500, None)
    clock.advance(5 * (1 - JITTER) - 0.1)
    assert deliver(deliverer) == 0
    clock.advance(2.2)
    assert deliver(deliverer) == 1
    clock.advance(40)
    assert deliver(deliverer) == 1
    (delivery,) = deliveries_to(endpoint, database)
    assert (delivery.attempts, delivery.last_status, delivery.delivered_at) == (3, 200, clock())
    assert len({received.headers["webhook-id"] for received in receiver.received}) == 1
    assert len({received.body for received in receiver.received}) == 1
    # Each attempt has a new signature, because a receiver refuses messages older than five minutes.
    times = [int(received.headers["webhook-timestamp"]) for received in receiver.received]
    assert times[0] < times[1] < times[2] == int(clock().timestamp())


def test_delays_grow_until_the_last_attempt(
    database: Database,
    receiver: Receiver,
    endpoint: Endpoint,
    deliverer: Deliverer,
    clock: SteppedClock,
    end_job: Callable[[], str],
) -> None:
    receiver.answers = [503] * 20
    end_job()
    for delay in RETRY_DELAYS:
        assert deliver(deliverer) == 1
        due_at = deliveries_to(endpoint, database)[0].due_at
        assert due_at is not None
        assert (1 - JITTER) * delay <= due_at - clock() <= (1 + JITTER) * delay
        clock.now = due_at
    assert deliver(deliverer) == 1
    (delivery,) = deliveries_to(endpoint, database)
    assert (delivery.attempts, delivery.due_at, delivery.delivered_at) == (8, None, None)
    clock.advance(7 * 86_400)
    assert deliver(deliverer) == 0


def test_refused_url_is_recorded_as_the_error(
    database: Database, endpoint: Endpoint, clock: SteppedClock, end_job: Callable[[], str]
) -> None:
    end_job()
    # Private addresses are not allowed, as after a restart with other settings.
    assert deliver(Deliverer(database, Sender(), clock=clock)) == 1
    (delivery,) = deliveries_to(endpoint, database)
    assert delivery.last_status is None
    assert "https://" in (delivery.last_error or "")
    assert delivery.due_at is not None


def test_status_410_disables_the_endpoint(
    database: Database,
    receiver: Receiver,
    endpoint: Endpoint,
    deliverer: Deliverer,
    clock: SteppedClock,
    end_job: Callable[[], str],
) -> None:
    receiver.answers = [500, 410]
    end_job()
    assert deliver(deliverer) == 1
    end_job()
    assert deliver(deliverer) == 1
    end_job()
    clock.advance(86_400)
    assert deliver(deliverer) == 0
    with database.read() as connection:
        assert get_endpoint(connection, endpoint.id, project="local").disabled_at == START
    assert [(delivery.attempts, delivery.due_at) for delivery in deliveries_to(endpoint, database)] == [(1, None)] * 2


def test_unrecorded_delivery_is_sent_again_after_its_claim_expires(
    database: Database,
    receiver: Receiver,
    deliverer: Deliverer,
    clock: SteppedClock,
    end_job: Callable[[], str],
    endpoint: Endpoint,
) -> None:
    receiver.hold.clear()
    end_job()
    # Not joined before the second attempt, as if its process had died.
    (first,) = deliverer.deliver_due()
    wait_for(lambda: len(receiver.received) == 1)
    other = Deliverer(database, Sender(private=True), clock=clock)
    clock.advance(59)
    assert deliver(other) == 0
    clock.advance(2)
    (second,) = other.deliver_due()
    wait_for(lambda: len(receiver.received) == 2)
    receiver.answers = [500, 200]
    receiver.hold.set()
    first.join()
    second.join()
    assert receiver.received[0].headers["webhook-id"] == receiver.received[1].headers["webhook-id"]
    (delivery,) = deliveries_to(endpoint, database)
    assert delivery.attempts == 2


def test_internal_error_is_logged_and_the_delivery_retried(
    database: Database, receiver: Receiver, endpoint: Endpoint, clock: SteppedClock, end_job: Callable[[], str]
) -> None:
    end_job()

    def resolve(host: str, port: int) -> list[str]:
        raise RuntimeError("a faulty resolver")

    with capture_logs() as lines:
        assert deliver(Deliverer(database, Sender(private=True, resolve=resolve), clock=clock)) == 1
    assert [line["event"] for line in lines] == ["webhook_failed", "webhook_sent"]
    (delivery,) = deliveries_to(endpoint, database)
    assert "RuntimeError" in (delivery.last_error or "")
    assert delivery.due_at is not None
    clock.now = delivery.due_at
    assert deliver(Deliverer(database, Sender(private=True), clock=clock)) == 1
    assert len(receiver.received) == 1


def test_error_while_polling_does_not_end_the_deliverer(
    database: Database, receiver: Receiver, end_job: Callable[[], str]
) -> None:
    end_job()
    calls = 0

    def clock() -> datetime:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("a faulty clock")
        return START

    deliverer = Deliverer(database, Sender(private=True), clock=clock)
    deliverer.start()
    wait_for(lambda: len(receiver.received) == 1)
    deliverer.stop()
    wait_for(lambda: not any(thread.is_alive() for thread in deliverer._sending))


def test_concurrent_deliveries_are_limited(
    receiver: Receiver, deliverer: Deliverer, end_job: Callable[[], str]
) -> None:
    for _ in range(MAX_CONCURRENT + 3):
        end_job()
    receiver.hold.clear()
    threads = deliverer.deliver_due()
    assert len(threads) == MAX_CONCURRENT
    assert deliverer.deliver_due() == []
    receiver.hold.set()
    for thread in threads:
        thread.join()
    assert deliver(deliverer) == 3


def test_running_deliverer_sends_and_stops_although_a_receiver_hangs(
    database: Database, receiver: Receiver, endpoint: Endpoint, end_job: Callable[[], str], clock: SteppedClock
) -> None:
    deliverer = Deliverer(database, Sender(private=True), clock=clock)
    deliverer.start()
    end_job()
    wait_for(lambda: any(delivery.delivered_at for delivery in deliveries_to(endpoint, database)))
    receiver.hold.clear()
    end_job()
    wait_for(lambda: len(receiver.received) == 2)
    started = time.monotonic()
    deliverer.stop(patience_s=0.5)
    assert time.monotonic() - started < 3
    receiver.hold.set()
    wait_for(lambda: not any(thread.is_alive() for thread in deliverer._sending))
