from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta

import pytest

from qlora_service.domain.ids import new_id
from qlora_service.domain.jobs import JobStatus
from qlora_service.domain.webhooks import EVENT_TYPES, Delivery, Endpoint
from qlora_service.queue.claim import Claim
from qlora_service.queue.queue import Queue
from qlora_service.queue.requests import request_cancel
from qlora_service.store.database import Database
from qlora_service.store.webhooks import (
    any_due,
    claim_due,
    delete_endpoint,
    disable_endpoint,
    insert_delivery,
    insert_end_deliveries,
    insert_endpoint,
    list_deliveries,
    new_delivery,
    record_attempt,
)
from tests.control_plane import START, add_job, claim_next, clock, each_database, queue

__all__ = ["clock", "each_database", "queue"]

ALL = tuple(EVENT_TYPES.values())


def add_endpoint(database: Database, types: Sequence[str] = ALL, project: str = "local") -> Endpoint:
    endpoint = Endpoint(new_id("wh"), project, "hook", "https://hook.example/", list(types), "whsec_c2VjcmV0", START)
    with database.write() as connection:
        insert_endpoint(connection, endpoint)
    return endpoint


def deliveries(database: Database, endpoint: Endpoint) -> list[Delivery]:
    with database.read() as connection:
        return list_deliveries(connection, endpoint.id, before=None, limit=100)


def die_three_times(queue: Queue, claim: Claim) -> None:
    queue.died(claim, {"message": "killed"})
    for _ in range(2):
        queue.died(claim_next(queue), {"message": "killed"})


def cancel_running(database: Database, queue: Queue, claim: Claim) -> None:
    with database.write() as connection:
        request_cancel(connection, claim.job_id, START)
    queue.release(claim, "stopped")


ENDS: dict[str, tuple[JobStatus, Callable[[Database, Queue, Claim], None]]] = {
    "succeeds": (JobStatus.SUCCEEDED, lambda _, queue, claim: queue.succeed(claim, {"attempt": 1})),
    "fails": (JobStatus.FAILED, lambda _, queue, claim: queue.fail(claim, {"message": "no luck"})),
    "dies": (JobStatus.FAILED, lambda _, queue, claim: die_three_times(queue, claim)),
    "is cancelled": (JobStatus.CANCELLED, lambda _, queue, claim: queue.cancelled(claim)),
    "is cancelled and released": (JobStatus.CANCELLED, cancel_running),
}


@pytest.mark.parametrize("end", ENDS)
def test_every_end_of_a_job_gives_one_delivery(database: Database, queue: Queue, end: str) -> None:
    endpoint, job_id = add_endpoint(database), add_job(database)
    claim = claim_next(queue)
    assert deliveries(database, endpoint) == []
    status, end_job = ENDS[end]
    end_job(database, queue, claim)
    (delivery,) = deliveries(database, endpoint)
    assert (delivery.type, delivery.body["data"]) == (EVENT_TYPES[status], {"id": job_id})
    assert (delivery.created_at, delivery.due_at, delivery.attempts) == (START, START, 0)


def test_cancelled_queued_job_gives_one_delivery(database: Database, queue: Queue) -> None:
    endpoint, job_id = add_endpoint(database), add_job(database)
    for _ in range(2):
        with database.write() as connection:
            request_cancel(connection, job_id, START)
    assert [delivery.type for delivery in deliveries(database, endpoint)] == ["fine_tuning.job.cancelled"]


def test_end_that_is_rolled_back_gives_no_delivery(database: Database, queue: Queue) -> None:
    endpoint = add_endpoint(database)
    add_job(database)
    claim = claim_next(queue)
    with suppress(ZeroDivisionError), database.write() as connection:
        insert_end_deliveries(connection, claim.job_id, JobStatus.FAILED, START)
        raise ZeroDivisionError
    assert deliveries(database, endpoint) == []


def test_only_enabled_endpoints_of_the_project_for_the_event_get_a_delivery(database: Database) -> None:
    subscribed = [add_endpoint(database), add_endpoint(database, ["fine_tuning.job.failed"])]
    others = [
        add_endpoint(database, ["fine_tuning.job.succeeded"]),
        add_endpoint(database, project="other"),
        add_endpoint(database),
    ]
    with database.write() as connection:
        disable_endpoint(connection, others[-1].id, START)
    job_id = add_job(database)
    with database.write() as connection:
        insert_end_deliveries(connection, job_id, JobStatus.FAILED, START)
    assert [len(deliveries(database, endpoint)) for endpoint in subscribed + others] == [1, 1, 0, 0, 0]
    one, other = (deliveries(database, endpoint)[0] for endpoint in subscribed)
    assert one.event_id == other.event_id == one.body["id"]
    assert one.id != other.id


def test_claimed_delivery_cannot_be_claimed_again_before_it_is_due(database: Database) -> None:
    add_endpoint(database)
    job_id = add_job(database)
    with database.write() as connection:
        insert_end_deliveries(connection, job_id, JobStatus.FAILED, START)
    until = START + timedelta(seconds=60)
    with database.write() as connection:
        assert not any_due(connection, START - timedelta(seconds=1))
        assert any_due(connection, START)
        ((first, _),) = claim_due(connection, START, until, 10)
        assert (first.attempts, first.due_at) == (1, until)
        assert not any_due(connection, START)
        assert claim_due(connection, START, until, 10) == []
        ((second, _),) = claim_due(connection, until, until + timedelta(seconds=60), 10)
        assert (second.id, second.attempts) == (first.id, 2)


def test_concurrent_threads_claim_each_delivery_once(database: Database) -> None:
    endpoint = add_endpoint(database)
    with database.write() as connection:
        for number in range(20):
            insert_delivery(connection, new_delivery(endpoint.id, ALL[0], f"job_{number}", START))
    claimed: list[str] = []
    started = threading.Barrier(4)

    def work() -> None:
        started.wait()
        while True:
            with database.write() as connection:
                claims = claim_due(connection, START, START + timedelta(seconds=60), 3)
            if not claims:
                return
            claimed.extend(delivery.id for delivery, _ in claims)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(delivery.id for delivery in deliveries(database, endpoint))


def test_late_outcome_of_an_earlier_attempt_changes_nothing(database: Database) -> None:
    endpoint = add_endpoint(database)
    job_id = add_job(database)
    with database.write() as connection:
        insert_end_deliveries(connection, job_id, JobStatus.FAILED, START)
        ((first, _),) = claim_due(connection, START, START, 10)
        ((second, _),) = claim_due(connection, START, START, 10)
        record_attempt(connection, second, last_status=200, delivered_at=START, due_at=None)
        record_attempt(connection, first, last_status=500, due_at=START)
    (delivery,) = deliveries(database, endpoint)
    assert (delivery.last_status, delivery.delivered_at, delivery.due_at) == (200, START, None)


def test_job_ends_while_an_endpoint_is_being_deleted(postgres_url: str) -> None:
    database = Database(postgres_url)
    kept, deleted = add_endpoint(database), add_endpoint(database)
    add_job(database)
    queue = Queue(database, lease_s=60)
    claim = claim_next(queue)
    with database.write() as connection:
        delete_endpoint(connection, deleted.id)
        end = threading.Thread(target=queue.succeed, args=(claim, {"attempt": 1}))
        end.start()
        end.join(0.5)
        assert end.is_alive()  # waits for the transaction that deletes the endpoint
    end.join()
    assert len(deliveries(database, kept)) == 1
    assert deliveries(database, deleted) == []
    database.close()
