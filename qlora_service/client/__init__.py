"""The Python SDK.

    from qlora_service.client import Client

    with Client("http://127.0.0.1:8080", api_key="…") as client:
        job = client.submit({"base_model": "SmolLM2-135M-Instruct"}, dataset_file="rows.jsonl")
        for event in client.watch(job.id):
            print(event.type, event.data)
        client.download(job.id, "adapter")

Raises `ServiceError` for what the service refuses and `Unreachable` when no answer comes from it.
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
from qlora_service.client.transport import EXAMPLE_URL, Backoff, Drop, Transport, stranger
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
"""How long a service that has answered before may stay away."""


class Client:
    """A connection to one service; a context manager.

    `patience_s` is how long `watch`, `wait` and `download` go on trying to reconnect to a service that went away.
    Every other request is sent again for a minute at most; what changes something takes effect once. `on_drop` is told
    when such waiting begins. The key is sent to `base_url` only, and never shown.
    """

    def __init__(
        self,
        base_url: str = EXAMPLE_URL,
        *,
        api_key: str | None = None,
        patience_s: float = PATIENCE_S,
        on_drop: Drop | None = None,
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

    # --- datasets, models and recipes

    def upload(self, path: str | Path, *, container: Container | None = None, shape: Shape | None = None) -> Dataset:
        """The stored dataset; the file is streamed."""
        params = _given(filename=Path(path).name, container=container, shape=shape)
        with _readable(path) as file:
            return Dataset.model_validate(
                self._transport.post("/datasets", params=params, content=file, file=file, patient=True)
            )

    def datasets(self) -> Iterator[Dataset]:
        """All datasets, newest first."""
        return (Dataset.model_validate(value) for value in self._transport.pages("/datasets"))

    def dataset(
        self, dataset_id: str, *, base_model: str | None = None, max_seq_len_tokens: int | None = None
    ) -> Dataset:
        """The dataset; with `base_model` also how long its rows are in tokens."""
        params = _given(base_model=base_model, max_seq_len_tokens=max_seq_len_tokens)
        return Dataset.model_validate(self._transport.get(_dataset(dataset_id), params))

    def preview(
        self,
        dataset_id: str,
        base_model: str,
        *,
        max_seq_len_tokens: int | None = None,
        too_long: str | None = None,
        train_on: str | None = None,
        skip: int = 0,
        limit: int = 5,
    ) -> list[PreviewRow]:
        """Rows as a job with these settings will train them."""
        params = _given(
            base_model=base_model,
            max_seq_len_tokens=max_seq_len_tokens,
            too_long=too_long,
            train_on=train_on,
            skip=skip,
            limit=limit,
        )
        rows = self._transport.get(f"{_dataset(dataset_id)}/preview", params)["data"]
        return [PreviewRow.model_validate(value) for value in rows]

    def delete_dataset(self, dataset_id: str) -> None:
        """Returns when the dataset is gone; jobs that were trained on it stay."""
        self._transport.delete(_dataset(dataset_id))

    def models(self) -> list[Model]:
        """The base models a job may name."""
        return [Model.model_validate(value) for value in self._transport.get("/models")["data"]]

    def recipes(self) -> list[Recipe]:
        """The recipes a job may name."""
        return [Recipe.model_validate(value) for value in self._transport.get("/recipes")["data"]]

    # --- jobs

    def plan(
        self,
        spec: JobSpec | Mapping[str, Any],
        *,
        config: Mapping[str, Any] | None = None,
        device: str | None = None,
        free_bytes: int | None = None,
        probe: bool = False,
    ) -> Plan:
        """Whether the job would fit, on the service's device or on a named card, how it would run and how long.

        `config` is a model's config.json, in place of `spec`'s base model. With `probe`, a step is timed when a slot is
        free, if finished jobs do not say how long it takes: plan again a minute later.
        """
        options = {"config": config, "device": device, "free_bytes": free_bytes, "probe": probe or None}
        given = {name: value for name, value in options.items() if value is not None}
        return Plan.model_validate(self._transport.post("/plans", json=_document(spec) | given))

    def submit(
        self,
        spec: JobSpec | Mapping[str, Any],
        dataset_file: str | Path | None = None,
        *,
        force: bool = False,
        idempotency_key: str | None = None,
    ) -> Job:
        """The queued job, with the service's `warnings`; the rows come from `dataset_file` or from `spec`'s dataset.

        With `force` it is queued also if it should not fit into the device's memory. However often the client sends the
        request, it makes one job; with an `idempotency_key` of yours also if you call this again within a week.
        """
        document = _document(spec) | ({"force": True} if force else {})
        if dataset_file is None:
            return Job.model_validate(self._transport.post("/jobs", json=document, patient=True, key=idempotency_key))
        with _readable(dataset_file) as file:
            parts = {"dataset": (Path(dataset_file).name, file, "application/octet-stream")}
            form = {"config": json.dumps(document)}
            answer = self._transport.post("/jobs", data=form, files=parts, file=file, patient=True, key=idempotency_key)
            return Job.model_validate(answer)

    def get(self, job_id: str) -> Job:
        return Job.model_validate(self._transport.get(_job(job_id)))

    def jobs(self, *, status: str | None = None, base_model: str | None = None) -> Iterator[Job]:
        """All jobs that match, newest first."""
        params = _given(status=status, base_model=base_model)
        return (Job.model_validate(value) for value in self._transport.pages("/jobs", params))

    def cancel(self, job_id: str) -> Job:
        """The job as it is now: cancelled, or running up to its next step."""
        return Job.model_validate(self._transport.post(f"{_job(job_id)}/cancel"))

    def pause(self, job_id: str) -> Job:
        """The job as it is now: paused, or running up to its next step."""
        return Job.model_validate(self._transport.post(f"{_job(job_id)}/pause"))

    def resume(self, job_id: str) -> Job:
        """The job as it is now: queued, to go on from its last saved step."""
        return Job.model_validate(self._transport.post(f"{_job(job_id)}/resume"))

    def metrics(self, job_id: str) -> list[dict[str, Any]]:
        """One record per step and evaluation that the job has done, by step."""
        data: list[dict[str, Any]] = self._transport.get(f"{_job(job_id)}/metrics")["data"]
        return data

    def watch(self, job_id: str, after: int = 0, *, on_drop: Drop | None = None) -> Iterator[Event]:
        """The job's events after number `after`, as they happen, up to the one with a terminal status.

        A dropped connection is taken up again where it broke off.
        """
        backoff = self._transport.backoff(on_drop)
        for event in self._events(f"{_job(job_id)}/events", after, backoff, ended=lambda: self.get(job_id).terminal):
            yield event
            if event.ends_job:
                return

    def events(self, job_id: str, after: int = 0) -> Iterator[Event]:
        """The job's events after number `after`, up to now."""
        path = f"{_job(job_id)}/events?follow=false"
        return self._events(path, after, self._transport.backoff(), ended=lambda: True)

    def watch_all(self, after: int | None = None) -> Iterator[Event]:
        """The events of all jobs after number `after`, or from now on, as they happen; there is no last one."""
        return self._events("/events", after, self._transport.backoff(), ended=lambda: False)

    def _events(self, path: str, after: int | None, backoff: Backoff, *, ended: Callable[[], bool]) -> Iterator[Event]:
        """The events of as many connections as it takes, until one brings none and all is `ended`."""
        last = after
        while True:
            asked_after = last
            try:
                for event in self._stream(path, last):
                    last = event.seq
                    backoff.reset()
                    yield event
                # A service that stops ends its streams too: only one without an event says that there are no more.
                if last == asked_after:
                    if ended():
                        return
                    raise Unreachable(f"{self.base_url} closed the event stream {path}")
            except (Unreachable, ServiceError) as error:
                if not self._transport.may_pass(error):
                    raise
                backoff.pause(error)

    def _stream(self, path: str, after: int | None) -> Iterator[Event]:
        """The events that one connection brings."""
        headers = {} if after is None else {"Last-Event-ID": str(after)}
        with self._transport.stream(path, headers) as response:
            if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
                raise stranger(response)
            for sent in httpx2.EventSource(response):
                yield Event(int(sent.id), sent.event, json.loads(sent.data))

    def wait(self, job_id: str, *, timeout_s: float | None = None, poll_s: float = 0.5) -> Job:
        """The job once it has ended, however it did.

        Raises:
            TimeoutError: it has not ended after `timeout_s`.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        job = self.get(job_id)
        while not job.terminal:
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"job {job_id} is {job.status} after {timeout_s} s: wait longer, or cancel it")
            time.sleep(poll_s)
            job = self.refresh(job_id)
        return job

    def refresh(self, job_id: str, *, on_drop: Drop | None = None) -> Job:
        """As `get`, for a service that has answered before: it may be away for a while."""
        return Job.model_validate(self._transport.get(_job(job_id), backoff=self._transport.backoff(on_drop)))

    # --- chat

    def chat(self, model: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> Generator[str, None, None]:
        """The pieces of the model's answer as they come; `options` are those of POST /v1/chat/completions.

        `model` is a base model's name, a fine-tuned model's, or a succeeded job's id. The first request has the base
        loaded, which is waited for. Closing the iterator ends the answer.
        """
        return stream_answer(self._transport, {"model": model, "messages": list(messages), **options})

    # --- artifacts

    def artifacts(self, job_id: str) -> list[ArtifactFile]:
        """What a job published: a succeeded one, or one that failed after some finite steps."""
        data = self._transport.get(f"{_job(job_id)}/artifacts")["data"]
        return [ArtifactFile.model_validate(value) for value in data]

    def download(self, job_id: str, directory: str | Path) -> list[Path]:
        """The job's published files, now in `directory`, each verified against its SHA-256.

        A file appears under its name only when it is whole; a broken-off download is resumed from its `.part`.

        Raises:
            InvalidRequest: the directory cannot be made or written, or holds another file of such a name, which is
                left alone.
        """
        return fetch_files(self._transport, job_id, self.artifacts(job_id), Path(directory))


@contextmanager
def _readable(path: str | Path) -> Iterator[BinaryIO]:
    """The opened file. Raises: InvalidRequest."""
    try:
        file = Path(path).open("rb")  # noqa: SIM115 - closed below; only opening it may blame the caller
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from None
    with file:
        yield file


def _document(spec: JobSpec | Mapping[str, Any]) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude_unset=True) if isinstance(spec, JobSpec) else dict(spec)


def _given(**values: str | int | None) -> dict[str, str]:
    return {key: str(value) for key, value in values.items() if value is not None}


def _job(job_id: str) -> str:
    return f"/jobs/{quote(job_id, safe='')}"


def _dataset(dataset_id: str) -> str:
    return f"/datasets/{quote(dataset_id, safe='')}"
