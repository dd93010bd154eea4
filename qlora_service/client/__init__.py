"""The Python SDK.

    from qlora_service.client import Client

    with Client("http://127.0.0.1:8080") as client:
        job = client.submit({"base_model": "SmolLM2-135M-Instruct"}, dataset_file="rows.jsonl")
        client.wait(job.id)
        client.download(job.id, "adapter")

Raises `ServiceError` for what the service refuses and `errors.Unavailable` when it cannot be reached.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self
from urllib.parse import quote

import httpx2

from qlora_service.client.transport import EXAMPLE_URL, Backoff, Drop, Transport, transient
from qlora_service.client.wire import ArtifactFile, Dataset, Event, Job, Model, Recipe, ServiceError
from qlora_service.data.examples import Container, Shape
from qlora_service.errors import InvalidRequest, Unavailable
from qlora_service.specs import JobSpec

__all__ = ["ArtifactFile", "Client", "Dataset", "Event", "Job", "Model", "Recipe", "ServiceError"]

PATIENCE_S = 600.0
"""How long a service that has answered before may stay away."""
CHUNK_BYTES = 1 << 20


class Client:
    """A connection to one service; a context manager.

    `patience_s` is how long `events`, `wait` and `download` go on trying to reconnect to a service that went away.
    What changes something is sent again for a minute at most, and takes effect once.
    """

    def __init__(self, base_url: str = EXAMPLE_URL, *, patience_s: float = PATIENCE_S) -> None:
        self._transport = Transport(base_url, patience_s)
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

    def upload_dataset(
        self, path: str | Path, *, container: Container | None = None, shape: Shape | None = None
    ) -> Dataset:
        """The stored dataset; the file is streamed."""
        params = _given(filename=Path(path).name, container=container, shape=shape)
        with _readable(path) as file:
            return Dataset.model_validate(
                self._transport.post("/datasets", params=params, content=file, file=file, patient=True)
            )

    def datasets(self) -> Iterator[Dataset]:
        """All datasets, newest first."""
        return (Dataset.model_validate(value) for value in self._transport.pages("/datasets"))

    def models(self) -> list[Model]:
        """The base models a job may name."""
        return [Model.model_validate(value) for value in self._transport.get("/models")["data"]]

    def recipes(self) -> list[Recipe]:
        """The recipes a job may name."""
        return [Recipe.model_validate(value) for value in self._transport.get("/recipes")["data"]]

    # --- jobs

    def submit(self, spec: JobSpec | Mapping[str, Any], dataset_file: str | Path | None = None) -> Job:
        """The queued job, with the service's `warnings`; the rows come from `dataset_file` or from `spec`'s dataset."""
        document = spec.model_dump(mode="json", exclude_unset=True) if isinstance(spec, JobSpec) else dict(spec)
        if dataset_file is None:
            return Job.model_validate(self._transport.post("/jobs", json=document, patient=True))
        with _readable(dataset_file) as file:
            parts = {"dataset": (Path(dataset_file).name, file, "application/octet-stream")}
            form = {"config": json.dumps(document)}
            answer = self._transport.post("/jobs", data=form, files=parts, file=file, patient=True)
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

    def events(self, job_id: str, after: int = 0, *, on_drop: Drop | None = None) -> Iterator[Event]:
        """The job's events after number `after`, as they happen, up to the one with a terminal status.

        A dropped connection is taken up again where it broke off; `on_drop` is told of it.
        """
        backoff = Backoff(self._transport.patience_s)
        last, reached = after, False
        while True:
            try:
                with self._transport.stream(f"{_job(job_id)}/events", headers={"Last-Event-ID": str(last)}) as response:
                    reached = True
                    for sent in httpx2.EventSource(response):
                        event = Event(int(sent.id), sent.event, json.loads(sent.data))
                        last = event.seq
                        backoff.reset()
                        yield event
                        if event.ends_job:
                            return
                if self.get(job_id).terminal:
                    return
                dropped: Exception = Unavailable(f"{self.base_url} closed the event stream of job {job_id}")
            except (Unavailable, ServiceError) as error:
                if not reached or not transient(error):
                    raise
                dropped = error
            if on_drop is not None:
                on_drop(dropped)
            backoff.pause(dropped)

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
        return self._transport.persist(lambda: self.get(job_id), on_drop)

    # --- artifacts

    def artifacts(self, job_id: str) -> list[ArtifactFile]:
        """What a job published: a succeeded one, or one that failed after some finite steps."""
        data = self._transport.get(f"{_job(job_id)}/artifacts")["data"]
        return [ArtifactFile.model_validate(value) for value in data]

    def download(self, job_id: str, directory: str | Path) -> list[Path]:
        """The job's published files, now in `directory`, each verified against its SHA-256.

        A file appears under its name only when it is whole; a broken-off download is resumed from its `.part`.

        Raises:
            InvalidRequest: the directory cannot be made, or holds another file of such a name, which is left alone.
        """
        directory = Path(directory)
        files = self.artifacts(job_id)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequest(f"{directory} cannot be made ({error.strerror}): choose another directory") from error
        _refuse_to_overwrite(files, directory)
        return [self._download_file(job_id, file, directory / _plain_name(file.name)) for file in files]

    def _download_file(self, job_id: str, file: ArtifactFile, target: Path) -> Path:
        if target.is_file() and _sha256(target) == file.sha256:
            return target
        part = target.with_name(target.name + ".part")
        resumed = part.exists()
        self._transport.persist(lambda: self._fetch(job_id, file, part))
        if resumed and _sha256(part) != file.sha256:
            # The part was of another file: once more, from the start.
            part.unlink()
            self._transport.persist(lambda: self._fetch(job_id, file, part))
        if (digest := _sha256(part)) != file.sha256:
            part.unlink()
            raise Unavailable(
                f"{file.name} of job {job_id} arrived with SHA-256 {digest}, not {file.sha256}: download it again; "
                "if that does not help, the stored file is damaged"
            )
        return part.replace(target)

    def _fetch(self, job_id: str, file: ArtifactFile, part: Path) -> None:
        """Brings `part` to its full length."""
        with part.open("ab") as opened:
            start = opened.tell()
            if start > file.bytes:
                start = opened.truncate(0)
            if start == file.bytes:
                return
            headers = {"Accept-Encoding": "identity"}
            if start:
                headers |= {"Range": f"bytes={start}-", "If-Range": f'"{file.sha256}"'}
            with self._transport.stream(f"{_job(job_id)}/artifacts/{quote(file.name)}", headers=headers) as response:
                if response.status_code != httpx2.codes.PARTIAL_CONTENT:
                    opened.truncate(0)
                for chunk in response.iter_bytes(CHUNK_BYTES):
                    opened.write(chunk)
            opened.flush()
            os.fsync(opened.fileno())


def _refuse_to_overwrite(files: Sequence[ArtifactFile], directory: Path) -> None:
    """Raises: InvalidRequest, naming files that are there with other bytes."""
    others = [
        file.name
        for file in files
        if (there := directory / _plain_name(file.name)).exists() and (there.is_dir() or _sha256(there) != file.sha256)
    ]
    if others:
        raise InvalidRequest(
            f"{directory} holds another {', '.join(others)}: download into an empty directory, or remove what is there"
        )


@contextmanager
def _readable(path: str | Path) -> Iterator[BinaryIO]:
    """The opened file. Raises: InvalidRequest."""
    try:
        file = Path(path).open("rb")  # noqa: SIM115 - closed below; only opening it may blame the caller
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from None
    with file:
        yield file


def _given(**values: str | None) -> dict[str, str]:
    return {key: value for key, value in values.items() if value is not None}


def _job(job_id: str) -> str:
    return f"/jobs/{quote(job_id, safe='')}"


def _plain_name(name: str) -> str:
    """`name`, which must not lead out of a directory. Raises: InvalidRequest."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise InvalidRequest(f"the service names an artifact {name!r}, which is no plain file name: nothing is written")
    return name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
