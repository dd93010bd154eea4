from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import pytest

from qlora_service.client import Client, Event, ServiceError
from qlora_service.domain.jobs import JobStatus
from qlora_service.errors import InvalidRequest, Unavailable
from qlora_service.queue.claim import Claim, Progress
from qlora_service.queue.queue import Queue
from qlora_service.specs import DatasetRef, JobSpec
from tests.breaking_proxy import BreakingProxy
from tests.running_api import ROWS, RunningApi

SPEC = {"base_model": "tiny", "training": {"max_seq_len_tokens": 64}}


def report_step(queue: Queue, claim: Claim, number: int) -> None:
    metrics = {"step": number, "loss": 1.0 / number}
    progress = Progress(phase="training", step=number, total_steps=3, metrics=metrics)
    queue.report(claim, progress, ("metrics", {**metrics, "attempt": claim.token}))


def test_uploaded_dataset_has_its_counts(client: Client, rows: Path) -> None:
    dataset = client.upload(rows)
    assert (dataset.filename, dataset.rows, dataset.usable_rows) == ("rows.jsonl", 8, 8)
    assert dataset.bytes == rows.stat().st_size
    assert next(client.datasets()).id == dataset.id


def test_refused_dataset_names_lines(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"\n{"other": 1}\n')
    with pytest.raises(ServiceError) as caught:
        client.upload(path)
    assert caught.value.status == 422
    assert caught.value.code == "invalid_dataset"
    assert [finding.line for finding in caught.value.findings] == [1, 2]


def test_unreadable_file_is_named(client: Client, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"absent\.jsonl cannot be read"):
        client.upload(tmp_path / "absent.jsonl")


def test_dataset_has_lengths_and_preview_marks_trained_tokens(client: Client, rows: Path) -> None:
    uploaded = client.upload(rows)
    assert uploaded.lengths is None
    lengths = client.dataset(uploaded.id, base_model="tiny").lengths
    assert lengths is not None
    assert (lengths.rows, lengths.complete) == (8, True)
    first, second = client.preview(uploaded.id, "tiny", prompt_format="plain", skip=1, limit=2)
    assert (first.line, second.line) == (2, 3)
    assert first.text == "1 plus one is 2."
    assert [first.text[start:end] for start, end in first.trained_spans] == [" 2."]
    assert first.appended_stop == "<|im_end|>"
    (turns,) = client.preview(uploaded.id, "tiny", skip=1, limit=1)
    assert turns.text.endswith("assistant\n 2.<|im_end|>\n")
    assert turns.appended_stop is None
    (left_out,) = client.preview(uploaded.id, "tiny", max_seq_len_tokens=2, limit=1)
    assert left_out.problem is not None
    assert "max_seq_len_tokens is 2" in left_out.problem


def test_deleted_dataset_is_not_found(client: Client, rows: Path) -> None:
    dataset = client.upload(rows)
    client.delete_dataset(dataset.id)
    assert dataset.id not in {other.id for other in client.datasets()}
    with pytest.raises(ServiceError) as caught:
        client.delete_dataset(dataset.id)
    assert caught.value.status == 404


def test_models_are_those_of_the_catalog(client: Client) -> None:
    assert [(model.name, model.source) for model in client.models()] == [("tiny", "directory")]


def test_recipes_are_those_that_a_spec_can_name(client: Client) -> None:
    recipes = client.recipes()
    assert "qlora-paper" in {recipe.name for recipe in recipes}
    for recipe in recipes:
        spec = JobSpec.model_validate({"base_model": "tiny", "recipe": recipe.name}).model_dump(mode="json")
        for group, values in recipe.values.items():
            assert {field: spec[group][field] for field in values} == values


def test_job_is_submitted_with_a_file_or_with_a_stored_dataset(client: Client, rows: Path) -> None:
    with_file = client.submit(SPEC, rows)
    spec = JobSpec.model_validate({**SPEC, "dataset": DatasetRef(id=with_file.dataset_id)})
    stored = client.submit(spec)
    assert stored.dataset_id == with_file.dataset_id
    assert (stored.status, stored.base_model) == ("queued", "tiny")
    assert client.get(stored.id).id == stored.id


def test_job_submitted_again_with_its_idempotency_key_is_the_same(client: Client, rows: Path) -> None:
    first = client.submit(SPEC, rows, idempotency_key="key-1")
    assert client.submit(SPEC, rows, idempotency_key="key-1").id == first.id
    assert client.submit(SPEC, rows).id != first.id


def test_refused_spec_has_a_location(client: Client, rows: Path) -> None:
    with pytest.raises(ServiceError) as caught:
        client.submit({**SPEC, "training": {"learnin_rate": 1}}, rows)
    assert caught.value.status == 422
    assert caught.value.location == "/training/learnin_rate"
    assert "learning_rate" in caught.value.message


def test_jobs_are_newest_first_over_all_pages(client: Client, rows: Path) -> None:
    dataset = client.upload(rows)
    submitted = [client.submit({**SPEC, "dataset": {"id": dataset.id}}).id for _ in range(22)]
    assert [job.id for job in islice(client.jobs(status="queued"), 22)] == submitted[::-1]
    assert list(client.jobs(base_model="other")) == []


def test_cancelled_job_has_ended(client: Client, rows: Path) -> None:
    job = client.cancel(client.submit(SPEC, rows).id)
    assert job.terminal
    assert client.wait(job.id).status == JobStatus.CANCELLED


def test_queued_job_is_paused_and_resumed(client: Client, queue: Queue, rows: Path) -> None:
    job = client.pause(client.submit({**SPEC, "priority": 100}, rows).id)
    assert (job.status, job.terminal) == (JobStatus.PAUSED, False)
    assert job.hold is not None
    assert job.hold["reason"] == "user"
    resumed = client.resume(job.id)
    assert (resumed.status, resumed.hold, resumed.queue_position) == (JobStatus.QUEUED, None, 0)
    client.cancel(job.id)


def test_running_job_has_its_stop_request(client: Client, queue: Queue, claim: Claim) -> None:
    assert client.pause(claim.job_id).stop_request == "pause"
    assert client.cancel(claim.job_id).stop_request == "cancel"
    queue.cancelled(claim)


def test_unknown_job_is_not_found(client: Client) -> None:
    with pytest.raises(ServiceError, match="job_none") as caught:
        client.get("job_none")
    assert caught.value.status == 404


def test_events_start_after_the_given_number_and_end_with_the_job(client: Client, queue: Queue, claim: Claim) -> None:
    report_step(queue, claim, 1)
    queue.fail(claim, {"code": "job_failed", "message": "no"})
    events = list(client.watch(claim.job_id))
    assert [event.type for event in events] == ["status", "status", "metrics", "status"]
    assert events[-1].data["status"] == "failed"
    assert list(client.watch(claim.job_id, after=events[1].seq)) == events[2:]
    assert list(client.watch(claim.job_id, after=events[-1].seq)) == []
    assert [record["loss"] for record in client.metrics(claim.job_id)] == [1.0]


def test_events_up_to_now_end_while_the_job_runs(client: Client, queue: Queue, claim: Claim) -> None:
    report_step(queue, claim, 1)
    events = list(client.events(claim.job_id))
    assert [event.data.get("step") for event in events] == [None, None, 1]
    report_step(queue, claim, 2)
    assert [event.data["step"] for event in client.events(claim.job_id, after=events[-1].seq)] == [2]
    queue.fail(claim, {"code": "job_failed", "message": "no"})


def test_events_are_requested_until_a_stream_has_none(client: Client, queue: Queue, claim: Claim) -> None:
    events = client.events(claim.job_id)
    first = next(events)
    # The stream has ended after the second event, as it does when the service stops.
    time.sleep(0.3)
    report_step(queue, claim, 1)
    assert [event.data.get("step") for event in (first, *events)] == [None, None, 1]
    queue.fail(claim, {"code": "job_failed", "message": "no"})


def test_events_of_all_jobs_are_watched(client: Client, queue: Queue, claim: Claim) -> None:
    report_step(queue, claim, 1)
    first_seq = next(client.watch(claim.job_id)).seq
    queue.fail(claim, {"code": "job_failed", "message": "no"})
    other = client.cancel(client.submit({**SPEC, "dataset": {"rows": ROWS}}).id)
    events = list(islice(client.watch_all(first_seq - 1), 6))
    assert [event.job_id for event in events] == [claim.job_id] * 4 + [other.id] * 2
    assert events[-1].data["status"] == "cancelled"


def test_events_continue_after_the_service_was_killed(
    api: RunningApi, client: Client, queue: Queue, claim: Claim
) -> None:
    events: list[Event] = []
    dropped: list[float] = []

    def watch() -> None:
        events.extend(client.watch(claim.job_id, on_drop=lambda _, patience_s: dropped.append(patience_s)))

    reader = threading.Thread(target=watch)
    report_step(queue, claim, 1)
    reader.start()
    time.sleep(1.0)
    api.stop(signal.SIGKILL)
    report_step(queue, claim, 2)
    api.start()
    queue.fail(claim, {"code": "job_failed", "message": "no"})
    reader.join(20)
    assert set(dropped) == {20.0}
    assert [event.data.get("step") for event in events] == [None, None, 1, 2, None]
    assert len({event.seq for event in events}) == 5


def test_every_event_arrives_once_over_broken_connections(proxy: BreakingProxy, queue: Queue, claim: Claim) -> None:
    for number in range(1, 60):
        report_step(queue, claim, number)
    queue.fail(claim, {"code": "job_failed", "message": "no"})
    proxy.cut_after = 2500
    with Client(proxy.url, patience_s=20) as client:
        events = list(client.watch(claim.job_id))
    assert [event.data["step"] for event in events if event.type == "metrics"] == list(range(1, 60))
    assert len({event.seq for event in events}) == len(events) == 62
    assert len(proxy.brought) > 2


def test_waiting_survives_a_restart(api: RunningApi, client: Client, queue: Queue, claim: Claim) -> None:
    ended: list[str] = []
    waiter = threading.Thread(target=lambda: ended.append(client.wait(claim.job_id, poll_s=0.05).status))
    waiter.start()
    time.sleep(0.3)
    api.stop()
    time.sleep(0.3)
    api.start()
    assert not ended
    queue.fail(claim, {"code": "job_failed", "message": "no"})
    waiter.join(20)
    assert ended == ["failed"]


def test_waiting_ends_at_its_timeout(client: Client, claim: Claim, queue: Queue) -> None:
    with pytest.raises(TimeoutError, match="is running after"):
        client.wait(claim.job_id, timeout_s=0.2, poll_s=0.1)
    queue.fail(claim, {"code": "job_failed", "message": "no"})


def test_error_for_a_refused_connection_says_how_to_start_a_service() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(Unavailable, match="qlora serve"):
        client.get("job_1")
    with Client("http://127.0.0.1:9") as client, pytest.raises(Unavailable):
        next(client.watch("job_1"))
    with Client("http://127.0.0.1:9") as client, pytest.raises(Unavailable):
        client.cancel("job_1")


@pytest.mark.parametrize("address", ["localhost:8080", "ftp://host", "nonsense", "http://[::1"])
def test_address_without_a_host_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest, match="address of a service"):
        Client(address)


def test_another_server_is_detected(tmp_path: Path) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Client(f"http://127.0.0.1:{server.server_port}") as client, pytest.raises(ServiceError) as caught:
            client.models()
        server.shutdown()
    assert caught.value.code == "unexpected_answer"
    assert "check the address" in caught.value.message


def test_sdk_needs_the_base_dependencies_only() -> None:
    heavy = ("torch", "transformers", "fastapi", "sqlalchemy", "obstore", "pyarrow", "tokenizers", "numpy")
    code = f"import sys, qlora_service.client; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
