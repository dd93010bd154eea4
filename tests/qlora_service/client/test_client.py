from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import pytest

from qlora_service.artifacts.store import job_key
from qlora_service.client import Client, Event, ServiceError
from qlora_service.errors import InvalidRequest, Unavailable
from qlora_service.jobs import JobStatus
from qlora_service.models.catalog import Catalog
from qlora_service.queue import Claim, Progress, Queue
from qlora_service.specs import DatasetRef, JobSpec
from tests.running_api import RunningApi, open_queue, succeed, write_rows

SPEC = {"base_model": "tiny", "training": {"max_seq_len_tokens": 64}}
FILES = {"adapter_model.safetensors": os.urandom(300_000), "adapter_config.json": b"{}", "empty.txt": b""}


@pytest.fixture(scope="module")
def api(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApi]:
    data_dir = tmp_path_factory.mktemp("data")
    Catalog(data_dir / "models").import_model("tiny", tiny_model)
    with RunningApi(data_dir) as running:
        yield running


@pytest.fixture
def client(api: RunningApi) -> Iterator[Client]:
    with Client(api.url, patience_s=20) as client:
        yield client


@pytest.fixture
def queue(api: RunningApi) -> Queue:
    return open_queue(api.data_dir)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def claim(client: Client, queue: Queue, rows: Path) -> Claim:
    """A running job: the most urgent of all."""
    job = client.submit({**SPEC, "priority": 100}, rows)
    claimed = queue.claim("test")
    assert claimed is not None
    assert claimed[1].id == job.id
    return claimed[0]


def step(queue: Queue, claim: Claim, number: int) -> None:
    metrics = {"step": number, "loss": 1.0 / number}
    progress = Progress(phase="training", step=number, total_steps=3, metrics=metrics)
    queue.report(claim, progress, ("metrics", {**metrics, "attempt": claim.token}))


def test_uploaded_dataset_comes_back_with_its_counts(client: Client, rows: Path) -> None:
    dataset = client.upload_dataset(rows)
    assert (dataset.filename, dataset.rows, dataset.usable_rows) == ("rows.jsonl", 8, 8)
    assert dataset.bytes == rows.stat().st_size
    assert next(client.datasets()).id == dataset.id


def test_refused_dataset_names_lines(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"\n{"other": 1}\n')
    with pytest.raises(ServiceError) as caught:
        client.upload_dataset(path)
    assert caught.value.status == 422
    assert caught.value.code == "invalid_dataset"
    assert [finding.line for finding in caught.value.findings] == [1, 2]


def test_unreadable_file_is_named(client: Client, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"absent\.jsonl cannot be read"):
        client.upload_dataset(tmp_path / "absent.jsonl")


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


def test_refused_spec_says_where(client: Client, rows: Path) -> None:
    with pytest.raises(ServiceError) as caught:
        client.submit({**SPEC, "training": {"learnin_rate": 1}}, rows)
    assert caught.value.status == 422
    assert caught.value.location == "/training/learnin_rate"
    assert "learning_rate" in caught.value.message


def test_jobs_come_newest_first_over_all_pages(client: Client, rows: Path) -> None:
    dataset = client.upload_dataset(rows)
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


def test_running_job_shows_what_it_was_asked(client: Client, queue: Queue, claim: Claim) -> None:
    assert client.pause(claim.job_id).stop_request == "pause"
    assert client.cancel(claim.job_id).stop_request == "cancel"
    queue.cancelled(claim)


def test_unknown_job_is_not_found(client: Client) -> None:
    with pytest.raises(ServiceError, match="job_none") as caught:
        client.get("job_none")
    assert caught.value.status == 404


def test_events_run_from_the_given_number_to_the_end(client: Client, queue: Queue, claim: Claim) -> None:
    step(queue, claim, 1)
    queue.fail(claim, {"code": "job_failed", "message": "no"})
    events = list(client.events(claim.job_id))
    assert [event.type for event in events] == ["status", "status", "metrics", "status"]
    assert events[-1].data["status"] == "failed"
    assert list(client.events(claim.job_id, after=events[1].seq)) == events[2:]
    assert list(client.events(claim.job_id, after=events[-1].seq)) == []
    assert [record["loss"] for record in client.metrics(claim.job_id)] == [1.0]


def test_events_go_on_after_the_service_was_killed(api: RunningApi, client: Client, queue: Queue, claim: Claim) -> None:
    events: list[Event] = []
    dropped: list[Exception] = []
    reader = threading.Thread(target=lambda: events.extend(client.events(claim.job_id, on_drop=dropped.append)))
    step(queue, claim, 1)
    reader.start()
    time.sleep(1.0)
    api.stop(signal.SIGKILL)
    step(queue, claim, 2)
    api.start()
    queue.fail(claim, {"code": "job_failed", "message": "no"})
    reader.join(20)
    assert dropped
    assert [event.data.get("step") for event in events] == [None, None, 1, 2, None]
    assert len({event.seq for event in events}) == 5


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


def test_waiting_ends_with_its_time(client: Client, claim: Claim, queue: Queue) -> None:
    with pytest.raises(TimeoutError, match="is running after"):
        client.wait(claim.job_id, timeout_s=0.2, poll_s=0.1)
    queue.fail(claim, {"code": "job_failed", "message": "no"})


def test_download_brings_every_file_and_its_manifest(
    api: RunningApi, client: Client, queue: Queue, claim: Claim, tmp_path: Path
) -> None:
    succeed(api.data_dir, queue, claim, FILES)
    paths = client.download(claim.job_id, tmp_path / "out")
    assert {path.name for path in paths} == {*FILES, "manifest.json"}
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in FILES.items())
    assert not list(tmp_path.glob("out/*.part"))
    before = [path.stat().st_ino for path in paths]
    assert [path.stat().st_ino for path in client.download(claim.job_id, tmp_path / "out")] == before


def test_broken_off_download_is_resumed(
    api: RunningApi, client: Client, queue: Queue, claim: Claim, tmp_path: Path
) -> None:
    succeed(api.data_dir, queue, claim, FILES)
    weights = FILES["adapter_model.safetensors"]
    (tmp_path / "adapter_model.safetensors.part").write_bytes(weights[:200_000])
    api.log.write_bytes(b"")
    client.download(claim.job_id, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == weights
    partial = [line for line in api.log.read_text().splitlines() if '"status": 206' in line]
    assert len(partial) == 1
    assert "adapter_model.safetensors" in partial[0]


@pytest.mark.parametrize("stale", [b"of another file", b"x" * 300_000, b"x" * 400_000])
def test_part_of_another_file_is_replaced(
    api: RunningApi, client: Client, queue: Queue, claim: Claim, tmp_path: Path, stale: bytes
) -> None:
    succeed(api.data_dir, queue, claim, FILES)
    (tmp_path / "adapter_model.safetensors.part").write_bytes(stale)
    client.download(claim.job_id, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == FILES["adapter_model.safetensors"]


def test_damaged_file_never_gets_its_name(
    api: RunningApi, client: Client, queue: Queue, claim: Claim, tmp_path: Path
) -> None:
    succeed(api.data_dir, queue, claim, FILES)
    stored = api.data_dir / "artifacts" / job_key(claim.job_id, claim.token, "adapter_config.json")
    stored.write_bytes(b"[]")
    with pytest.raises(Unavailable, match=r"adapter_config\.json .* arrived with SHA-256"):
        client.download(claim.job_id, tmp_path)
    assert not list(tmp_path.glob("adapter_config.json*"))


def test_refused_connection_says_how_to_start_a_service() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(Unavailable, match="qlora serve"):
        client.get("job_1")
    with Client("http://127.0.0.1:9") as client, pytest.raises(Unavailable):
        next(client.events("job_1"))
    with Client("http://127.0.0.1:9") as client, pytest.raises(Unavailable):
        client.cancel("job_1")


@pytest.mark.parametrize("address", ["localhost:8080", "ftp://host", "nonsense", "http://[::1"])
def test_address_without_a_host_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest, match="address of a service"):
        Client(address)


def test_another_server_is_told_apart(tmp_path: Path) -> None:
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


def test_download_leaves_files_of_others_alone(
    api: RunningApi, client: Client, queue: Queue, claim: Claim, tmp_path: Path
) -> None:
    succeed(api.data_dir, queue, claim, FILES)
    mine = tmp_path / "out" / "adapter_config.json"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(InvalidRequest, match=r"holds another adapter_config\.json"):
        client.download(claim.job_id, mine.parent)
    assert list(mine.parent.iterdir()) == [mine]
    assert mine.read_text() == "mine"


def test_download_into_a_file_is_refused(
    api: RunningApi, client: Client, queue: Queue, claim: Claim, tmp_path: Path
) -> None:
    succeed(api.data_dir, queue, claim, FILES)
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequest, match="choose another directory"):
        client.download(claim.job_id, tmp_path / "file")
