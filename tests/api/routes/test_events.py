from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient

from qlora_service.queue import Claim, Progress, Queue
from qlora_service.settings import Settings
from tests.api.conftest import Server, chat_rows, spec_of

Event = dict[str, Any]


def parse(lines: Iterator[str]) -> Iterator[Event]:
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
def following(url: str, job_id: str, last_event_id: str | None = None) -> Iterator[Iterator[Event]]:
    headers = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
    with httpx2.stream("GET", f"{url}/jobs/{job_id}/events", headers=headers, timeout=20) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        yield parse(response.iter_lines())


def claim_next(queue: Queue) -> Claim:
    claimed = queue.claim("worker")
    assert claimed is not None
    return claimed[0]


def report(queue: Queue, claim: Claim, step: int) -> None:
    queue.report(claim, Progress(step=step), ("metrics", {"attempt": claim.token, "step": step}))


@pytest.fixture
def ended_job(client: TestClient, submit: Callable[..., str], queue: Queue) -> str:
    job_id = submit()
    claim = claim_next(queue)
    report(queue, claim, 1)
    queue.fail(claim, {"message": "no luck"})
    return job_id


def test_ended_job_is_replayed_and_the_stream_ends(client: TestClient, ended_job: str) -> None:
    events = list(parse(iter(client.get(f"/jobs/{ended_job}/events").text.splitlines())))
    assert [event["event"] for event in events] == ["status", "status", "metrics", "status"]
    assert [event["data"].get("status") for event in events] == ["queued", "running", None, "failed"]
    assert events[-1]["data"]["error"] == {"message": "no luck"}
    assert [int(event["id"]) for event in events] == sorted({int(event["id"]) for event in events})


def test_replay_starts_after_the_last_event_seen(client: TestClient, ended_job: str) -> None:
    path = f"/jobs/{ended_job}/events"
    everything = list(parse(iter(client.get(path).text.splitlines())))
    seen = everything[1]["id"]
    for answer in (
        client.get(path, headers={"Last-Event-ID": seen}),
        client.get(path, params={"after": seen}),
        client.get(path, params={"after": 0}, headers={"Last-Event-ID": seen}),
    ):
        assert list(parse(iter(answer.text.splitlines()))) == everything[2:]
    assert client.get(path, headers={"Last-Event-ID": everything[-1]["id"]}).text == ""


def test_history_longer_than_one_reading_is_complete(
    client: TestClient, submit: Callable[..., str], queue: Queue
) -> None:
    job_id = submit()
    claim = claim_next(queue)
    for step in range(600):
        report(queue, claim, step)
    queue.cancelled(claim)
    events = list(parse(iter(client.get(f"/jobs/{job_id}/events").text.splitlines())))
    assert [event["data"]["step"] for event in events if event["event"] == "metrics"] == list(range(600))
    assert events[-1]["data"] == {"status": "cancelled"}


@pytest.mark.parametrize("seq", ["-1", "x", "9" * 30])
def test_impossible_event_id_is_refused(client: TestClient, ended_job: str, seq: str) -> None:
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
        assert next(events)["data"] == {"status": "queued"}
        claim = claim_next(queue)
        assert next(events)["data"]["status"] == "running"
        report(queue, claim, 1)
        seen = next(events)
        assert seen["data"]["step"] == 1
        # Stopping the service ends the stream cleanly, well before open connections would be cut.
        stopping = threading.Thread(target=first.process.terminate)
        stopping.start()
        started = time.monotonic()
        assert list(events) == []
        assert time.monotonic() - started < 2
        stopping.join()
    assert first.process.wait(timeout=5) == -15
    report(queue, claim, 2)

    second = start_server(port=int(first.url.rpartition(":")[2]))
    with following(second.url, job_id, seen["id"]) as events:
        assert next(events)["data"]["step"] == 2
        queue.fail(claim, {"message": "no luck"})
        assert [event["data"]["status"] for event in events] == ["failed"]
