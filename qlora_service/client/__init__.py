"""The Python SDK.

    from qlora_service.client import Client

    with Client("http://127.0.0.1:8080", api_key="…") as client:
        job = client.submit({"base_model": "SmolLM2-135M-Instruct"}, dataset_file="rows.jsonl")
        for event in client.watch(job.id):
            print(event.type, event.data)
        client.download(job.id, "adapter")

Calls raise `ServiceError` if the service refuses a request, and `Unreachable` if no answer arrives.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self
from urllib.parse import quote

import httpx2

from qlora_service.client.chat import stream_answer
from qlora_service.client.downloads import fetch_files
from qlora_service.client.transport import EXAMPLE_URL, Backoff, OnDrop, Transport, unexpected_answer
from qlora_service.client.wire import (
    ArtifactFile,
    Dataset,
    Event,
    Job,
    Model,
    Plan,
    PreviewRow,
    Recipe,
    ServiceError,
    Unreachable,
)
from qlora_service.data.rows.examples import Container, Shape
from qlora_service.errors import InvalidRequest
from qlora_service.specs import JobSpec

__all__ = [
    "ArtifactFile",
    "Client",
    "Dataset",
    "Event",
    "Job",
    "Model",
    "Plan",
    "PreviewRow",
    "Recipe",
    "ServiceError",
    "Unreachable",
]

PATIENCE_S = 600.0
"""Seconds for which requests are retried to a service that has answered before."""


class Client:
    """A connection to one service; a context manager.

    `patience_s` is how long `watch`, `wait` and `download` retry while a service that has answered before is away.
    Every other request is retried for at most a minute; a change takes effect once. `on_drop` is called at the start of
    each outage, with the error and the seconds of retries. The key is sent to `base_url` only, and never shown.
    """

    def __init__(
        self,
        base_url: str = EXAMPLE_URL,
        *,
        api_key: str | None = None,
        patience_s: float = PATIENCE_S,
        on_drop: OnDrop | None = None,
    ) -> None:
        self._transport = Transport(base_url, api_key=api_key, patience_s=patience_s, on_drop=on_drop)
        self.base_url = self._transport.base_url

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.base_url!r})"

    def close(self) -> None:
        self._transport.close()

    def healthy(self) -> bool:
        """Whether the service answers."""
        return self._transport.answers("/healthz")

    def upload(self, path: str | Path, *, container: Container | None = None, shape: Shape | None = None) -> Dataset:
        """Uploads the file as a stream; the stored dataset."""
        params = _query(filename=Path(path).name, container=container, shape=shape)
        with _readable(path) as file:
            return Dataset.model_validate(
                self._transport.post("/datasets", params=params, content=file, file=file, read_s=None)
            )

    def datasets(self) -> Iterator[Dataset]:
        """All datasets, newest first."""
        return (Dataset.model_validate(value) for value in self._transport.pages("/datasets"))

    def dataset(
        self, dataset_id: str, *, base_model: str | None = None, max_seq_len_tokens: int | None = None
    ) -> Dataset:
        """The dataset; with `base_model` also its rows' lengths in tokens."""
        params = _query(base_model=base_model, max_seq_len_tokens=max_seq_len_tokens)
        return Dataset.model_validate(self._transport.get(_dataset(dataset_id), params))

    def preview(
        self,
        dataset_id: str,
        base_model: str,
        *,
        max_seq_len_tokens: int | None = None,
        too_long: str | None = None,
        train_on: str | None = None,
        prompt_format: str | None = None,
        skip: int = 0,
        limit: int = 5,
    ) -> list[PreviewRow]:
        """The first usable rows after `skip`, as a job with these settings trains them."""
        params = _query(
            base_model=base_model,
            max_seq_len_tokens=max_seq_len_tokens,
            too_long=too_long,
            train_on=train_on,
            prompt_format=prompt_format,
            skip=skip,
            limit=limit,
        )
        rows = self._transport.get(f"{_dataset(dataset_id)}/preview", params)["data"]
        return [PreviewRow.model_validate(value) for value in rows]

    def delete_dataset(self, dataset_id: str) -> None:
        """Deletes the dataset. Jobs that were trained on it are kept."""
        self._transport.delete(_dataset(dataset_id))

    def models(self) -> list[Model]:
        """The base models that a job can train on."""
        return [Model.model_validate(value) for value in self._transport.get("/models")["data"]]

    def recipes(self) -> list[Recipe]:
        """The recipes that a job can name."""
        return [Recipe.model_validate(value) for value in self._transport.get("/recipes")["data"]]

    def plan(
        self,
        spec: JobSpec | Mapping[str, Any],
        *,
        config: Mapping[str, Any] | None = None,
        device: str | None = None,
        free_bytes: int | None = None,
        probe: bool = False,
    ) -> Plan:
        """Prediction of whether the job fits on the service's device or on a named card, of its settings and duration.

        `config` is a model's config.json, in place of `spec`'s base model. With `probe`, the service times a step when
        a slot is free, if no finished job gives the duration: plan again a minute later.
        """
        options = {"config": config, "device": device, "free_bytes": free_bytes, "probe": probe or None}
        options = {name: value for name, value in options.items() if value is not None}
        return Plan.model_validate(self._transport.post("/plans", json=_document(spec) | options))

    def submit(
        self,
        spec: JobSpec | Mapping[str, Any],
        dataset_file: str | Path | None = None,
        *,
        force: bool = False,
        idempotency_key: str | None = None,
    ) -> Job:
        """The queued job, with the service's `warnings`; the rows are `dataset_file` or the dataset of `spec`.

        With `force` the job is queued even if it is not predicted to fit into the device's memory. The client's retries
        create one job; with the same `idempotency_key`, so do repeated calls within a week.
        """
        document = _document(spec) | ({"force": True} if force else {})
        if dataset_file is None:
            answer = self._transport.post("/jobs", json=document, read_s=None, idempotency_key=idempotency_key)
            return Job.model_validate(answer)
        with _readable(dataset_file) as file:
            parts = {"dataset": (Path(dataset_file).name, file, "application/octet-stream")}
            form = {"config": json.dumps(document)}
            answer = self._transport.post(
                "/jobs", data=form, files=parts, file=file, read_s=None, idempotency_key=idempotency_key
            )
            return Job.model_validate(answer)

    def get(self, job_id: str) -> Job:
        return Job.model_validate(self._transport.get(_job(job_id)))

    def jobs(self, *, status: str | None = None, base_model: str | None = None) -> Iterator[Job]:
        """All jobs that match, newest first."""
        params = _query(status=status, base_model=base_model)
        return (Job.model_validate(value) for value in self._transport.pages("/jobs", params))

    def cancel(self, job_id: str) -> Job:
        """The job: cancelled, or running until its next step."""
        return Job.model_validate(self._transport.post(f"{_job(job_id)}/cancel"))

    def pause(self, job_id: str) -> Job:
        """The job: paused, or running until its next step."""
        return Job.model_validate(self._transport.post(f"{_job(job_id)}/pause"))

    def resume(self, job_id: str) -> Job:
        """The job: queued, to resume from its last saved step."""
        return Job.model_validate(self._transport.post(f"{_job(job_id)}/resume"))

    def metrics(self, job_id: str) -> list[dict[str, Any]]:
        """One record per completed step and evaluation, in the order of steps."""
        data: list[dict[str, Any]] = self._transport.get(f"{_job(job_id)}/metrics")["data"]
        return data

    def watch(self, job_id: str, after: int = 0, *, on_drop: OnDrop | None = None) -> Iterator[Event]:
        """The job's events after number `after`, as they happen, up to the event with a terminal status.

        After a broken connection the stream resumes after the last event.
        """
        backoff = self._transport.backoff(on_drop)
        path = f"{_job(job_id)}/events"
        for event in self._events(path, after, backoff, is_ended=lambda: self.get(job_id).terminal):
            yield event
            if event.ends_job:
                return

    def events(self, job_id: str, after: int = 0) -> Iterator[Event]:
        """The job's events after number `after`, up to the latest."""
        path = f"{_job(job_id)}/events?follow=false"
        return self._events(path, after, self._transport.backoff(), is_ended=lambda: True)

    def watch_all(self, after: int | None = None) -> Iterator[Event]:
        """The events of all jobs after number `after`, or from now on, as they happen, without end."""
        return self._events("/events", after, self._transport.backoff(), is_ended=lambda: False)

    def wait(self, job_id: str, *, timeout_s: float | None = None, poll_s: float = 0.5) -> Job:
        """The job once it has succeeded, failed or been cancelled.

        Raises:
            TimeoutError: the job has not ended after `timeout_s`.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        job = self.get(job_id)
        while not job.terminal:
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"job {job_id} is {job.status} after {timeout_s} s: wait longer, or cancel it")
            time.sleep(poll_s)
            job = self.refresh(job_id)
        return job

    def refresh(self, job_id: str, *, on_drop: OnDrop | None = None) -> Job:
        """As `get`, but retried for `patience_s` if the service has answered before."""
        return Job.model_validate(self._transport.get(_job(job_id), backoff=self._transport.backoff(on_drop)))

    def chat(self, model: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> Generator[str, None, None]:
        """The pieces of the model's answer as they are generated; `options` are fields of POST /v1/chat/completions.

        `model` is the name of a base model or fine-tuned model, or the id of a succeeded job. The first request waits
        until the base model is loaded. Closing the iterator stops the generation.
        """
        return stream_answer(self._transport, {"model": model, "messages": list(messages), **options})

    def artifacts(self, job_id: str) -> list[ArtifactFile]:
        """The published files of a job that succeeded, or that failed on non-finite losses after some finite steps."""
        data = self._transport.get(f"{_job(job_id)}/artifacts")["data"]
        return [ArtifactFile.model_validate(value) for value in data]

    def download(self, job_id: str, directory: str | Path) -> list[Path]:
        """Downloads the job's published files into `directory`, each verified against its SHA-256; their paths.

        A file gets its name only when it is complete; an interrupted download resumes from its `.part`.

        Raises:
            InvalidRequest: the directory cannot be created or written, or contains another file with one of the names,
                which is left unchanged.
        """
        return fetch_files(self._transport, job_id, self.artifacts(job_id), Path(directory))

    def _events(
        self, path: str, after: int | None, backoff: Backoff, *, is_ended: Callable[[], bool]
    ) -> Iterator[Event]:
        """The events of successive connections, until a connection delivers none and `is_ended()` is true."""
        last = after
        while True:
            connected_after = last
            try:
                for event in self._stream(path, last):
                    last = event.seq
                    backoff.reset()
                    yield event
                # A service that stops also ends its streams, so only a stream without an event may be the end.
                if last == connected_after:
                    if is_ended():
                        return
                    raise Unreachable(f"{self.base_url} closed the event stream {path}")
            except (Unreachable, ServiceError) as error:
                if not self._transport.is_transient(error):
                    raise
                backoff.pause(error)

    def _stream(self, path: str, after: int | None) -> Iterator[Event]:
        """The events of one connection."""
        headers = {} if after is None else {"Last-Event-ID": str(after)}
        with self._transport.stream(path, headers) as response:
            if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
                raise unexpected_answer(response)
            for sent in httpx2.EventSource(response):
                yield Event(int(sent.id), sent.event, json.loads(sent.data))


@contextmanager
def _readable(path: str | Path) -> Iterator[BinaryIO]:
    """The open file. Raises: InvalidRequest."""
    try:
        file = Path(path).open("rb")  # noqa: SIM115 - closed below; only an error on opening is the caller's
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from None
    with file:
        yield file


def _document(spec: JobSpec | Mapping[str, Any]) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude_unset=True) if isinstance(spec, JobSpec) else dict(spec)


def _query(**values: str | int | None) -> dict[str, str]:
    return {key: str(value) for key, value in values.items() if value is not None}


def _job(job_id: str) -> str:
    return f"/jobs/{quote(job_id, safe='')}"


def _dataset(dataset_id: str) -> str:
    return f"/datasets/{quote(dataset_id, safe='')}"
