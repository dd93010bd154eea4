"""Webhooks through OpenAI's client, with a running service and a receiver on real sockets."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Final

import httpx2
import openai
import pytest
from fastapi.testclient import TestClient
from openai import OpenAI

from qlora_service.domain.clock import utc_now
from qlora_service.store.database import Database
from qlora_service.webhooks.delivery import CLAIM_LEASE_S, Deliverer
from qlora_service.webhooks.sending import Sender
from tests.control_plane import add_job
from tests.receiver import Receiver, receiving
from tests.running_api import RunningApi, open_queue

SUCCEEDED: Final = "fine_tuning.job.succeeded"
FAILED: Final = "fine_tuning.job.failed"
PRIVATE = "import os; os.environ['QLORA_WEBHOOK_PRIVATE'] = 'true'"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApi]:
    with RunningApi(tmp_path_factory.mktemp("webhooks"), prelude=PRIVATE) as api:
        yield api


@pytest.fixture(scope="module")
def openai_client(api: RunningApi) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def database(api: RunningApi) -> Iterator[Database]:
    database = Database(f"sqlite:///{api.data_dir / 'state.db'}")
    yield database
    database.close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def fail_a_job(data_dir: Path, database: Database) -> str:
    job_id, queue = add_job(database), open_queue(data_dir)
    claimed = queue.claim("worker")
    assert claimed is not None
    queue.fail(claimed[0], {"message": "no luck"})
    return job_id


def test_client_creates_changes_and_deletes_endpoints(openai_client: OpenAI, receiver: Receiver) -> None:
    webhooks = openai_client.webhooks
    assert SUCCEEDED in webhooks.event_types.list().data
    created = [webhooks.create(name=f"n{n}", url=receiver.url(), event_types=[SUCCEEDED]) for n in range(3)]
    assert created[0].signing_secret.startswith("whsec_")
    listed = list(webhooks.list(limit=2))
    assert [endpoint.id for endpoint in listed] == [endpoint.id for endpoint in reversed(created)]
    one = webhooks.retrieve(created[0].id)
    assert (one.name, one.url, one.event_types) == ("n0", receiver.url(), [SUCCEEDED])
    assert one.signing_secret_hint == f"whsec_…{created[0].signing_secret[-4:]}"
    assert "signing_secret" not in (one.model_extra or {})
    assert webhooks.update(one.id, event_types=[FAILED]).event_types == [FAILED]
    rotated = webhooks.rotate_secret(one.id)
    assert rotated.signing_secret not in {endpoint.signing_secret for endpoint in created}
    for endpoint in created:
        assert webhooks.delete(endpoint.id).deleted
    with pytest.raises(openai.NotFoundError) as missing:
        webhooks.retrieve(one.id)
    assert missing.value.code == "not_found"


def test_client_verifies_the_message_of_a_failed_job(
    openai_client: OpenAI, api: RunningApi, receiver: Receiver, database: Database
) -> None:
    endpoint = openai_client.webhooks.create(name="receiver", url=receiver.url(), event_types=[FAILED])
    job_id = fail_a_job(api.data_dir, database)
    wait_for(lambda: len(receiver.received) == 1)
    (received,) = receiver.received
    event = openai_client.webhooks.unwrap(received.body, received.headers, secret=endpoint.signing_secret)
    assert event.type == "fine_tuning.job.failed"
    assert event.data.id == job_id
    assert event.id == received.headers["webhook-id"]
    with pytest.raises(openai.InvalidWebhookSignatureError):
        openai_client.webhooks.unwrap(received.body, received.headers, secret="whsec_" + "A" * 44)

    def delivery_log() -> list[dict[str, object]]:
        page = httpx2.get(f"{api.url}/v1/webhook_endpoints/{endpoint.id}/deliveries").json()
        assert (page["object"], page["has_more"]) == ("list", False)
        entries: list[dict[str, object]] = page["data"]
        return entries

    wait_for(lambda: [entry["status"] for entry in delivery_log()] == ["delivered"])
    (entry,) = delivery_log()
    assert (entry["event_id"], entry["type"], entry["data"]) == (event.id, FAILED, {"id": job_id})
    assert (entry["attempts"], entry["last_status"], entry["next_attempt_at"]) == (1, 200, None)


def test_client_verifies_messages_with_either_secret_after_a_rotation(
    openai_client: OpenAI, receiver: Receiver
) -> None:
    webhooks = openai_client.webhooks
    endpoint = webhooks.create(name="receiver", url=receiver.url(), event_types=[FAILED])
    rotated = webhooks.rotate_secret(endpoint.id, keep_old_secret_active_for_24_hours=True)
    webhooks.test(endpoint.id, event_type=FAILED)
    for secret in (endpoint.signing_secret, rotated.signing_secret):
        webhooks.unwrap(receiver.received[0].body, receiver.received[0].headers, secret=secret)
    webhooks.rotate_secret(endpoint.id, keep_old_secret_active_for_24_hours=False)
    webhooks.test(endpoint.id, event_type=FAILED)
    for secret in (endpoint.signing_secret, rotated.signing_secret):
        with pytest.raises(openai.InvalidWebhookSignatureError):
            webhooks.unwrap(receiver.received[1].body, receiver.received[1].headers, secret=secret)


def test_test_event_reaches_the_receiver(openai_client: OpenAI, receiver: Receiver) -> None:
    endpoint = openai_client.webhooks.create(name="receiver", url=receiver.url(), event_types=[FAILED])
    receiver.answers = [202]
    result = openai_client.webhooks.test(endpoint.id, event_type=SUCCEEDED)
    assert (result.status_code, result.success, result.webhook_endpoint_id) == (202, True, endpoint.id)
    (received,) = receiver.received
    event = openai_client.webhooks.unwrap(received.body, received.headers, secret=endpoint.signing_secret)
    assert event.type == "fine_tuning.job.succeeded"


def test_message_is_sent_again_if_the_service_dies_before_recording_it(
    openai_client: OpenAI, api: RunningApi, receiver: Receiver, database: Database
) -> None:
    openai_client.webhooks.create(name="receiver", url=receiver.url(), event_types=[FAILED])
    receiver.hold.clear()
    fail_a_job(api.data_dir, database)
    wait_for(lambda: len(receiver.received) == 1)
    api.stop(signal.SIGKILL)
    receiver.hold.set()
    later = Deliverer(database, Sender(private=True), clock=lambda: utc_now() + timedelta(seconds=CLAIM_LEASE_S))
    for thread in later.deliver_due():
        thread.join()
    api.start()
    first, second = receiver.received
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.body == second.body


def test_private_target_is_refused_with_the_reason(bare_client: TestClient) -> None:
    body = {"name": "receiver", "url": "https://localhost/", "event_types": [FAILED]}
    refused = bare_client.post("/v1/webhook_endpoints", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "url"
    assert "not on the public internet" in refused.json()["error"]["message"]
    for wrong in ({"url": "http://receiver.example/"}, {"event_types": "all"}, {"secret": "mine"}):
        assert bare_client.post("/v1/webhook_endpoints", json=body | wrong).status_code == 400
    assert bare_client.get("/v1/webhook_endpoints").json()["data"] == []


def test_repeated_request_with_its_key_creates_one_endpoint(api: RunningApi, receiver: Receiver) -> None:
    body = {"name": "receiver", "url": receiver.url(), "event_types": [SUCCEEDED]}
    answers = [
        httpx2.post(f"{api.url}/v1/webhook_endpoints", json=body, headers={"Idempotency-Key": "one"}) for _ in range(2)
    ]
    assert answers[0].json() == answers[1].json()
    assert answers[1].headers["Idempotent-Replayed"] == "true"
