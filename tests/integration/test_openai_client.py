"""The unmodified `openai` package against `qlora serve`: the calls of a script for the hosted API."""

from __future__ import annotations

import base64
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from qlora_service.actions.keys import open_key_registry
from qlora_service.cli.serving import pick_port
from qlora_service.models.catalog.catalog import Catalog
from tests.workspace import ROOT

ROWS = [
    {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(48)
]
SETTINGS = {"adapter": {"r": 4}, "training": {"max_seq_len_tokens": 64}, "evaluation": {"every_steps": 150}}
EPOCHS, STEPS = 30, 300
"""Enough steps that the job is still running when the test pauses it"""


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture(scope="module")
def client(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of a running `qlora serve`, with a key."""
    data_dir = tmp_path_factory.mktemp("openai") / "data"
    Catalog(data_dir / "models").import_model("tiny", tiny_model)
    registry = open_key_registry(f"sqlite:///{data_dir / 'state.db'}")
    _, key = registry.create_key("local", "test")
    registry.close()
    port = pick_port("127.0.0.1")
    command = [sys.executable, "-m", "qlora_service.cli", "serve", "--port", str(port), "--data-dir", str(data_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "QLORA_KEYS": "required"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    for line in process.stdout:
        if b"listens at" in line:
            break
    drain = threading.Thread(target=process.stdout.read)
    drain.start()
    try:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key) as openai_client:
            yield openai_client
    finally:
        process.terminate()
        process.wait(60)
        drain.join()
        process.stdout.close()


def wait_for_status(client: openai.OpenAI, job_id: str, status: str, limit_s: float = 120.0) -> FineTuningJob:
    """The job once it has this status."""
    deadline = time.monotonic() + limit_s
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status != status:
        assert time.monotonic() < deadline, job
        assert job.status not in ("succeeded", "failed", "cancelled"), job
        time.sleep(0.1)
    return job


@pytest.fixture(scope="module")
def files(client: openai.OpenAI) -> tuple[str, str]:
    """The ids of a training and a validation file."""
    train = client.files.create(purpose="fine-tune", file=("train.jsonl", jsonl(ROWS[:40])))
    validation = client.files.create(purpose="fine-tune", file=("validation.jsonl", jsonl(ROWS[40:])))
    assert (train.status, client.files.wait_for_processing(validation.id).status) == ("processed", "processed")
    return train.id, validation.id


@pytest.fixture(scope="module")
def trained(client: openai.OpenAI, files: tuple[str, str]) -> FineTuningJob:
    """A job that was paused while running, was resumed, and has succeeded."""
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=files[0],
        validation_file=files[1],
        suffix="My numbers",
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": EPOCHS, "batch_size": 4}}},
        extra_body={"qlora": SETTINGS},
    )
    assert (job.status, job.hyperparameters.n_epochs) == ("queued", EPOCHS)
    deadline = time.monotonic() + 120
    while not any('"train_loss"' in event.to_json() for event in client.fine_tuning.jobs.list_events(job.id, limit=5)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    client.fine_tuning.jobs.pause(job.id)
    paused = wait_for_status(client, job.id, "paused")
    assert 0 < paused.model_extra["qlora"]["checkpoint_step"] < STEPS  # type: ignore[index]
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    return wait_for_status(client, job.id, "succeeded")


def test_job_reports_its_settings_and_result(
    client: openai.OpenAI, trained: FineTuningJob, files: tuple[str, str]
) -> None:
    assert (trained.training_file, trained.validation_file) == files
    assert trained.fine_tuned_model == f"ft:tiny:local:my-numbers:{trained.id.removeprefix('job_')}"
    assert trained.hyperparameters.to_dict().items() >= {"n_epochs": EPOCHS, "learning_rate_multiplier": 1.0}.items()
    assert trained.finished_at is not None
    assert trained.created_at <= trained.finished_at
    assert trained.trained_tokens is not None
    assert trained.trained_tokens > 480
    assert trained.model_extra is not None
    assert trained.model_extra["qlora"]["result"]["certificate"]["difference"] <= 1e-4


def test_events_page_to_their_end(client: openai.OpenAI, trained: FineTuningJob) -> None:
    events = list(client.fine_tuning.jobs.list_events(trained.id, limit=50))
    assert [event.id for event in events] == sorted({event.id for event in events}, key=_number, reverse=True)
    assert events[0].message == "The job has successfully completed"
    losses = [event.data for event in events if event.type == "metrics"]
    assert {data["step"] for data in losses if "train_loss" in data} == set(range(1, STEPS + 1))  # type: ignore[index, operator]
    assert {"paused", "queued"} <= {event.data.get("status") for event in events}  # type: ignore[union-attr]


def _number(event_id: str) -> int:
    return int(event_id.rpartition("-")[2])


def test_checkpoint_is_the_published_model(client: openai.OpenAI, trained: FineTuningJob) -> None:
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(trained.id)
    assert (checkpoint.step_number, checkpoint.fine_tuned_model_checkpoint) == (STEPS, trained.fine_tuned_model)
    assert checkpoint.metrics.full_valid_loss is not None
    assert checkpoint.metrics.train_loss is not None


def test_result_file_holds_the_metrics(client: openai.OpenAI, trained: FineTuningJob) -> None:
    (file_id,) = trained.result_files
    file = client.files.retrieve(file_id)
    table = base64.b64decode(client.files.content(file_id).read())
    assert (file.purpose, file.bytes) == ("fine-tune-results", len(table))
    header, *lines = table.decode().splitlines()
    assert header == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert [line.split(",")[0] for line in lines] == [str(step) for step in range(STEPS + 1)]
    first, last = (float(lines[step].split(",")[3]) for step in (0, STEPS))
    assert last < first


def test_lists_end_and_filters_apply(client: openai.OpenAI, trained: FineTuningJob, files: tuple[str, str]) -> None:
    listed = [file.id for file in islice(client.files.list(limit=1), 10)]
    assert listed == [*trained.result_files, *reversed(files)]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=1, metadata={"team": "a"})] == [trained.id]
    assert list(client.fine_tuning.jobs.list(metadata={"team": "b"})) == []
    assert {model.id for model in client.models.list()} == {"tiny", trained.fine_tuned_model}


def test_upload_in_parts_is_a_file(client: openai.OpenAI) -> None:
    content = jsonl(ROWS[:7])
    upload = client.uploads.upload_file_chunked(
        file=content, filename="parts.jsonl", bytes=len(content), mime_type="application/jsonl", purpose="fine-tune",
        part_size=200,
    )  # fmt: skip
    assert upload.file is not None
    assert client.files.content(upload.file.id).read() == content
    assert client.files.delete(upload.file.id).deleted


def test_errors_are_errors_of_the_openai_client(client: openai.OpenAI, files: tuple[str, str]) -> None:
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.fine_tuning.jobs.create(model="tiny", training_file=files[0], method={"type": "reinforcement"})
    assert (unsupported.value.code, unsupported.value.param, unsupported.value.type) == (
        "unsupported_method",
        "method",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError) as unusable:
        client.files.create(purpose="fine-tune", file=("bad.jsonl", b'{"x": 1}\n'))
    assert (unusable.value.code, unusable.value.param) == ("invalid_dataset", "file")
    assert unusable.value.body["findings"][0]["line"] == 1  # type: ignore[index]
    with pytest.raises(openai.NotFoundError) as not_found:
        client.fine_tuning.jobs.retrieve("ftjob-none")
    assert (not_found.value.code, not_found.value.request_id is not None) == ("not_found", True)
    with pytest.raises(openai.AuthenticationError) as unauthenticated:
        client.with_options(api_key="qk_wrong").files.list()
    assert unauthenticated.value.code == "unauthenticated"
    with pytest.raises(openai.ConflictError):
        client.models.delete("tiny")


class _LosingFirstAnswer(BaseHTTPRequestHandler):
    """Forwards requests, and drops the answer to the first one."""

    upstream = ("127.0.0.1", 0)
    retry_counts: list[str | None]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        connection = http.client.HTTPConnection(*self.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        connection.request("POST", self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        self.retry_counts.append(self.headers["x-stainless-retry-count"])
        self.close_connection = True
        if len(self.retry_counts) > 1:
            self.send_response(answer.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing."""


@pytest.fixture
def client_with_lost_answer(client: openai.OpenAI) -> Iterator[tuple[openai.OpenAI, list[str | None]]]:
    """The client behind a proxy that drops the first answer, and the retry counts of the forwarded requests."""
    retry_counts: list[str | None] = []
    upstream = (client.base_url.host, client.base_url.port)
    handler = type("Handler", (_LosingFirstAnswer,), {"upstream": upstream, "retry_counts": retry_counts})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield client.with_options(base_url=f"http://127.0.0.1:{server.server_port}/v1"), retry_counts
        server.shutdown()
        serving.join()


def test_create_with_a_lost_answer_is_one_job(
    client: openai.OpenAI, client_with_lost_answer: tuple[openai.OpenAI, list[str | None]], files: tuple[str, str]
) -> None:
    retrying_client, retry_counts = client_with_lost_answer

    def create(with_client: openai.OpenAI) -> str:
        settings = {"qlora": SETTINGS | {"priority": -1}}
        return with_client.fine_tuning.jobs.create(
            model="tiny", training_file=files[0], metadata={"n": "lost"}, extra_body=settings
        ).id

    def job_ids() -> list[str]:
        return [job.id for job in client.fine_tuning.jobs.list(metadata={"n": "lost"})]

    retried = create(retrying_client)
    assert retry_counts == ["0", "1"]
    assert job_ids() == [retried]
    second = create(client)
    assert job_ids() == [second, retried]
    for job_id in (second, retried):
        client.fine_tuning.jobs.cancel(job_id)
        wait_for_status(client, job_id, "cancelled")  # a worker may have claimed it


def test_deleted_models_and_files_are_not_found(
    client: openai.OpenAI, trained: FineTuningJob, files: tuple[str, str]
) -> None:
    assert trained.fine_tuned_model is not None
    assert client.models.delete(trained.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(trained.fine_tuned_model)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=files[0], extra_body={"qlora": SETTINGS})
    with pytest.raises(openai.ConflictError, match=job.id):
        client.files.delete(files[0])
    client.fine_tuning.jobs.cancel(job.id)
    wait_for_status(client, job.id, "cancelled")
    assert client.files.delete(files[0]).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(files[0])
