from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient

from qlora_service.domain.clock import utc_now
from qlora_service.queue.claim import Claim, Progress
from qlora_service.queue.queue import Queue
from qlora_service.queue.requests import request_cancel
from qlora_service.settings import Settings
from qlora_service.store.database import Database
from tests.api.conftest import Server, chat_rows, spec_of
from tests.control_plane import add_job, claim_next
from tests.running_api import RunningApi, open_queue

Event = dict[str, Any]
QUICK_HEARTBEAT = "import fastapi.routing; fastapi.routing._PING_INTERVAL = 0.1"


def parse(lines: Iterator[str]) -> Iterator[Event]:
    """The events of a stream of server-sent events, without its comments."""
    event: Event = {}
    for line in lines:
        if line.startswith(":"):
            continue
        if not line and event:
            yield event
            event = {}
        elif line:
            name, _, value = line.partition(": ")
            event[name] = json.loads(value) if name == "data" else value


@contextmanager
def stream(url: str, last_event_id: str | None = None) -> Iterator[Iterator[str]]:
    headers = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
    with httpx2.stream("GET", url, headers=headers, timeout=20) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        yield response.iter_lines()


@contextmanager
def following(url: str, job_id: str, last_event_id: str | None = None) -> Iterator[Iterator[Event]]:
    with stream(f"{url}/jobs/{job_id}/events", last_event_id) as lines:
        yield parse(lines)


def report(queue: Queue, claim: Claim, step: int) -> None:
    queue.report(claim, Progress(step=step), ("metrics", {"attempt": claim.token, "step": step}))


@pytest.fixture
def ended_job(client: TestClient, submit: Callable[..., str], queue: Queue) -> str:
    job_id = submit()
    claim = claim_next(queue)
    report(queue, claim, 1)
    queue.fail(claim, {"message": "no luck"})
    return job_id


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApi]:
    with RunningApi(tmp_path_factory.mktemp("live"), prelude=QUICK_HEARTBEAT) as api:
        yield api


@pytest.fixture
def live_database(live: RunningApi) -> Iterator[Database]:
    database = Database(f"sqlite:///{live.data_dir / 'state.db'}")
    yield database
    database.close()


def test_stream_of_an_ended_job_replays_its_events_and_ends(client: TestClient, ended_job: str) -> None:
    events = list(parse(iter(client.get(f"/jobs/{ended_job}/events").text.splitlines())))
    assert [event["event"] for event in events] == ["status", "status", "metrics", "status"]
    assert [event["data"].get("status") for event in events] == ["queued", "running", None, "failed"]
    assert events[-1]["data"]["error"] == {"message": "no luck"}
    assert [int(event["id"]) for event in events] == sorted({int(event["id"]) for event in events})


def test_replay_starts_after_the_last_event_id(client: TestClient, ended_job: str) -> None:
    path = f"/jobs/{ended_job}/events"
    everything = list(parse(iter(client.get(path).text.splitlines())))
    last_id = everything[1]["id"]
    for response in (
        client.get(path, headers={"Last-Event-ID": last_id}),
        client.get(path, params={"after": last_id}),
        client.get(path, params={"after": 0}, headers={"Last-Event-ID": last_id}),
    ):
        assert list(parse(iter(response.text.splitlines()))) == everything[2:]
    assert client.get(path, headers={"Last-Event-ID": everything[-1]["id"]}).text == ""


def test_history_longer_than_one_query_is_complete(
    client: TestClient, submit: Callable[..., str], queue: Queue
) -> None:
    job_id = submit()
    claim = claim_next(queue)
    for step in range(600):
        report(queue, claim, step)
    queue.cancelled(claim)
    events = list(parse(iter(client.get(f"/jobs/{job_id}/events").text.splitlines())))
    assert [event["data"]["step"] for event in events if event["event"] == "metrics"] == list(range(600))
    assert events[-1]["data"]["status"] == "cancelled"


@pytest.mark.parametrize("seq", ["-1", "x", "9" * 30])
def test_invalid_event_id_is_refused(client: TestClient, ended_job: str, seq: str) -> None:
    response = client.get(f"/jobs/{ended_job}/events", headers={"Last-Event-ID": seq})
    assert response.status_code == 422
    assert response.json()["error"]["location"] == "last-event-id"


def test_stream_follows_a_job_across_a_restart_of_the_service(
    settings: Settings, start_server: Callable[..., Server], queue: Queue
) -> None:
    first = start_server()
    dataset_id = httpx2.post(f"{first.url}/datasets", content=chat_rows(4)).json()["id"]
    job_id = httpx2.post(f"{first.url}/jobs", json=spec_of(dataset_id)).json()["id"]
    with following(first.url, job_id) as events:
        assert next(events)["data"]["status"] == "queued"
        claim = claim_next(queue)
        assert next(events)["data"]["status"] == "running"
        report(queue, claim, 1)
        last_event = next(events)
        assert last_event["data"]["step"] == 1
        # Stopping the service ends the stream cleanly, before the grace period for open connections ends.
        stopping = threading.Thread(target=first.process.terminate)
        stopping.start()
        started = time.monotonic()
        assert list(events) == []
        assert time.monotonic() - started < 2
        stopping.join()
    assert first.process.wait(timeout=5) == -15
    report(queue, claim, 2)

    second = start_server(port=int(first.url.rpartition(":")[2]))
    with following(second.url, job_id, last_event["id"]) as events:
        assert next(events)["data"]["step"] == 2
        queue.fail(claim, {"message": "no luck"})
        assert [event["data"]["status"] for event in events] == ["failed"]


def test_events_contain_job_id_and_time(client: TestClient, ended_job: str) -> None:
    for event in parse(iter(client.get(f"/jobs/{ended_job}/events").text.splitlines())):
        assert event["data"]["job_id"] == ended_job
        assert datetime.fromisoformat(event["data"]["at"]).tzinfo is not None


def test_stream_of_selected_types_ends_with_the_job(client: TestClient, ended_job: str) -> None:
    def types(query: str) -> list[str]:
        response = client.get(f"/jobs/{ended_job}/events?{query}")
        return [event["event"] for event in parse(iter(response.text.splitlines()))]

    assert types("types=metrics") == ["metrics"]
    assert types("types=metrics&types=status") == ["status", "status", "metrics", "status"]
    assert client.get(f"/jobs/{ended_job}/events?types=metric").status_code == 422


def test_stream_without_follow_ends_after_the_stored_events(client: TestClient, submit: Callable[..., str]) -> None:
    job_id = submit()
    response = client.get(f"/jobs/{job_id}/events?follow=false")
    assert [event["data"]["status"] for event in parse(iter(response.text.splitlines()))] == ["queued"]


def test_idle_stream_is_kept_open_by_comments(live: RunningApi, live_database: Database) -> None:
    job_id = add_job(live_database)
    with stream(f"{live.url}/jobs/{job_id}/events") as lines:
        received = [next(lines) for _ in range(12)]
    assert received.count(": ping") >= 3
    (event,) = parse(iter(received))
    assert event["data"]["status"] == "queued"


def test_one_stream_follows_all_jobs_of_the_project(live: RunningApi, live_database: Database) -> None:
    queue = open_queue(live.data_dir)
    old_job, foreign_job = add_job(live_database), add_job(live_database, project="other")
    with stream(f"{live.url}/events") as lines:
        assert next(lines) == ": ping"  # the stream has begun
        new_job = add_job(live_database)
        with live_database.write() as connection:
            request_cancel(connection, foreign_job, utc_now())
            request_cancel(connection, old_job, utc_now())
        events = parse(lines)
        received = [next(events), next(events)]
        assert [(event["data"]["job_id"], event["data"]["status"]) for event in received] == [
            (new_job, "queued"),
            (old_job, "cancelled"),
        ]
    with stream(f"{live.url}/events", received[0]["id"]) as lines:
        assert next(parse(lines)) == received[1]
    with stream(f"{live.url}/events?after=0&types=metrics") as lines:
        claim = claim_next(queue)
        report(queue, claim, 7)
        event = next(parse(lines))
        assert (event["event"], event["data"]["job_id"], event["data"]["step"]) == ("metrics", claim.job_id, 7)


def test_event_id_beyond_the_last_one_means_only_new_events(live: RunningApi, live_database: Database) -> None:
    job_id = add_job(live_database)
    with stream(f"{live.url}/jobs/{job_id}/events?after={2**62}") as lines:
        assert next(lines) == ": ping"
        with live_database.write() as connection:
            request_cancel(connection, job_id, utc_now())
        assert [event["data"]["status"] for event in parse(lines)] == ["cancelled"]
