"""What a user can do, one function per action. The API, the command line and the tests all call these."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from qlora_service.artifacts.manifest import NAME as MANIFEST
from qlora_service.artifacts.manifest import Manifest, ManifestFile, describe_file
from qlora_service.artifacts.store import ArtifactStore, dataset_key, job_key
from qlora_service.data.checks import check_dataset, read_examples
from qlora_service.data.examples import Container, Shape, SourceRow
from qlora_service.data.rendering import (
    RenderedRow,
    Renderer,
    RenderReport,
    RenderRules,
    UnusableRow,
    render_report,
)
from qlora_service.errors import (
    Conflict,
    InvalidSpec,
    NotFound,
    QuotaExceeded,
    Unavailable,
)
from qlora_service.ids import new_id
from qlora_service.jobs import Job, JobEvent, JobStatus
from qlora_service.models.catalog import BaseModel, Catalog
from qlora_service.queue import Queue, utc_now
from qlora_service.specs import DatasetRef, JobSpec
from qlora_service.store import datasets as dataset_rows
from qlora_service.store import idempotency
from qlora_service.store import jobs as job_rows
from qlora_service.store.database import Database
from qlora_service.store.datasets import Dataset
from qlora_service.store.idempotency import Once
from qlora_service.store.tables import LOCAL_PROJECT
from qlora_service.submission import (
    check_fit,
    check_objective,
    check_trainable,
    fit_default_length,
    submission_warnings,
)

CHECKED_ROWS = 50_000
"""Rows rendered while a job is posted; the trainer checks the rest before it starts."""


METRICS = ("metrics", "evaluation")
"""Types of the events that hold a job's metrics."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Submission:
    """A job that was put into the queue, how many run before it, and what its submitter should know."""

    job: Job
    queue_position: int | None
    """None when it runs already."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Artifact:
    """A published file: what the manifest says of it, and where its bytes are."""

    file: ManifestFile
    key: str


class Service:
    """All actions of one project over one data directory's state; safe to share between threads.

    What belongs to another project is not there: it is NotFound, and in no list.

    What changes something takes a `once`: under its idempotency key the action happens one time, and a request that
    was answered before raises `store.idempotency.Replay`, or Conflict when it was another request.
    """

    def __init__(
        self,
        *,
        database: Database,
        artifacts: ArtifactStore,
        catalog: Catalog,
        queue: Queue,
        tmp_dir: Path,
        clock: Callable[[], datetime] = utc_now,
        max_queued_jobs: int | None = None,
        project: str = LOCAL_PROJECT,
    ) -> None:
        """`max_queued_jobs` is how many jobs of one project may wait at a time."""
        self._database = database
        self._artifacts = artifacts
        self._catalog = catalog
        self._queue = queue
        self._tmp_dir = tmp_dir
        self._clock = clock
        self._max_queued_jobs = max_queued_jobs
        self._project = project
        tmp_dir.mkdir(parents=True, exist_ok=True)

    @property
    def project(self) -> str:
        """Whose objects these actions see."""
        return self._project

    def within(self, project: str) -> Service:
        """The same service for another project."""
        other = copy.copy(self)
        other._project = project
        return other

    def check_ready(self) -> None:
        """Returns when a job could be taken: the database answers, and scratch files can be written.

        Raises:
            Unavailable: with the reason.
        """
        try:
            self.list_jobs(limit=1)
            with tempfile.TemporaryFile(dir=self._tmp_dir) as file:
                file.write(b"\0")
        except SQLAlchemyError as error:
            raise Unavailable(
                f"the database does not answer ({type(error).__name__}): see to it, then retry"
            ) from error
        except OSError as error:
            raise Unavailable(f"the data disk cannot be written ({error.strerror}): see to it, then retry") from error

    def close(self) -> None:
        """Give the database's connections back."""
        self._database.close()

    # --- datasets

    def add_dataset(
        self,
        path: Path,
        *,
        filename: str | None,
        container: Container | None = None,
        shape: Shape | None = None,
        once: Once[Dataset] | None = None,
    ) -> Dataset:
        """The stored dataset made of the file at `path`; nothing is stored when no row of it is usable.

        Raises:
            InvalidDataset: the container cannot be told or read, or no row is usable.
        """
        self._recall(once)
        dataset = self._checked(path, filename, container, shape)
        self._store_bytes(dataset, path)
        return self._write(once, lambda connection: dataset_rows.insert_dataset(connection, dataset))

    def get_dataset(self, dataset_id: str) -> Dataset:
        """Raises: NotFound."""
        with self._database.read() as connection:
            return dataset_rows.get_dataset(connection, dataset_id, project=self._project)

    def list_datasets(self, *, before: str | None = None, limit: int = 20) -> list[Dataset]:
        with self._database.read() as connection:
            return dataset_rows.list_datasets(connection, project=self._project, before=before, limit=limit)

    def dataset_lengths(self, dataset_id: str, base_model: str, rules: RenderRules) -> RenderReport:
        """Token counts and unusable rows of a dataset under one base model's tokenizer and template.

        Raises:
            NotFound: no such dataset.
            InvalidModel: unknown base model, or its template cannot be used.
        """
        dataset, model = self.get_dataset(dataset_id), self._catalog.get(base_model)
        with self._scratch() as scratch:
            return self._render_report(dataset, self._local(dataset, scratch), model, rules, keep=True)

    def preview(
        self, dataset_id: str, base_model: str, rules: RenderRules, *, skip: int = 0, limit: int = 5
    ) -> list[dict[str, Any]]:
        """Rows as they will be trained: text, tokens with id, text and whether trained, tokens cut off."""
        dataset, model = self.get_dataset(dataset_id), self._catalog.get(base_model)
        with self._scratch() as scratch, Renderer(model.path, rules, self._clock()) as renderer:
            rows = islice(_examples(dataset, self._local(dataset, scratch)), skip, skip + limit)
            return [_preview(renderer, result) for result in renderer.render(rows)]

    # --- base models

    def list_models(self) -> list[BaseModel]:
        return self._catalog.list()

    def get_model(self, name: str) -> BaseModel:
        """Raises: InvalidModel."""
        return self._catalog.get(name)

    # --- jobs

    def submit(
        self,
        spec: JobSpec,
        upload: Path | None = None,
        filename: str | None = None,
        *,
        once: Once[Submission] | None = None,
    ) -> Submission:
        """A queued job on a stored dataset, on the spec's inline rows, or on the file at `upload`.

        What can be known to fail is refused here, and then nothing is stored.

        Raises:
            InvalidSpec, InvalidModel, InvalidDataset, NotFound: with the place and what to do.
            QuotaExceeded: the project has as many jobs in the queue as may wait.
        """
        self._recall(once)
        model = self._catalog.get(spec.base_model)
        spec = fit_default_length(spec, model)
        check_fit(spec, model, self._catalog.module_shapes(model))
        with self._scratch() as scratch:
            dataset, path, is_new = self._source(spec, upload, filename, scratch)
            check_objective(spec, dataset.report.shape)
            report = self._render_report(dataset, path, model, RenderRules.of(spec.training), keep=not is_new)
            check_trainable(report, spec, model)
            if is_new:
                self._store_bytes(dataset, path)

        def insert(connection: Connection) -> Submission:
            stored = dataset_rows.insert_dataset(connection, dataset) if is_new else dataset
            job = self._insert_job(connection, spec, stored, model)
            return Submission(job, job_rows.count_ahead(connection, job), submission_warnings(report, stored, spec))

        return self._write(once, insert)

    def get_job(self, job_id: str) -> Job:
        """Raises: NotFound."""
        with self._database.read() as connection:
            return job_rows.get_job(connection, job_id, project=self._project)

    def queue_position(self, job: Job) -> int | None:
        """Jobs that run before this queued one; None for any other."""
        if job.status is not JobStatus.QUEUED:
            return None
        with self._database.read() as connection:
            return job_rows.count_ahead(connection, job)

    def list_jobs(
        self,
        *,
        status: JobStatus | None = None,
        base_model: str | None = None,
        before: str | None = None,
        limit: int = 20,
    ) -> list[Job]:
        """Jobs, newest first, older than the id `before`."""
        with self._database.read() as connection:
            return job_rows.list_jobs(
                connection, project=self._project, status=status, base_model=base_model, before=before, limit=limit
            )

    def cancel(self, job_id: str, *, once: Once[Job] | None = None) -> Job:
        """The job as it is now: cancelled, or asked to stop at its next step. Raises: NotFound, Conflict."""
        return self._write(
            once, lambda connection: self._queue.request_cancel(connection, self._own(connection, job_id))
        )

    def pause(self, job_id: str, *, once: Once[Job] | None = None) -> Job:
        """The job as it is now: paused, or asked to stop at its next step. Raises: NotFound, Conflict."""
        return self._write(
            once, lambda connection: self._queue.request_pause(connection, self._own(connection, job_id))
        )

    def resume(self, job_id: str, *, once: Once[Submission] | None = None) -> Submission:
        """The job, queued again, or running on if its pause had not come about yet. Raises: NotFound, Conflict."""

        def enqueue(connection: Connection) -> Submission:
            job = self._queue.resume(connection, self._own(connection, job_id))
            queued = job.status is JobStatus.QUEUED
            return Submission(job, job_rows.count_ahead(connection, job) if queued else None)

        return self._write(once, enqueue)

    def job_events(self, job_id: str, after: int = 0, limit: int | None = None) -> list[JobEvent]:
        """Events after sequence number `after`, oldest first. Raises: NotFound."""
        with self._database.read() as connection:
            job_rows.get_job(connection, job_id, project=self._project)
            return job_rows.events_after(connection, job_id, after, limit=limit)

    def job_metrics(self, job_id: str) -> list[dict[str, Any]]:
        """One record per step and evaluation that the job has done, over all attempts, by step. Raises: NotFound."""
        with self._database.read() as connection:
            job_rows.get_job(connection, job_id, project=self._project)
            events = job_rows.events_after(connection, job_id, types=("log", *METRICS))
        return _standing_metrics(events)

    # --- artifacts

    def manifest(self, job_id: str) -> Manifest:
        """What a job published: its certified adapter, or what its last finite step left when it failed.

        Raises:
            NotFound: no such job.
            Conflict: the job has not succeeded (yet).
        """
        return Manifest.model_validate_json(self._manifest_content(self._manifest_key(job_id)))

    def artifacts(self, job_id: str) -> list[Artifact]:
        """Every published file, the manifest last. Raises: NotFound, Conflict."""
        key = self._manifest_key(job_id)
        content = self._manifest_content(key)
        manifest = Manifest.model_validate_json(content)
        itself = ManifestFile(name=MANIFEST, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        files = [Artifact(file, job_key(job_id, manifest.attempt, file.name)) for file in manifest.files]
        return [*files, Artifact(itself, key)]

    def artifact(self, job_id: str, name: str) -> Artifact:
        """Raises: NotFound, Conflict."""
        published = {artifact.file.name: artifact for artifact in self.artifacts(job_id)}
        if name not in published:
            raise NotFound(f"job {job_id} published no {name!r}; it published {', '.join(published)}", location="name")
        return published[name]

    def read_artifact(self, artifact: Artifact, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes [start, end) of a published file, in chunks."""
        return self._artifacts.read(artifact.key, start, end)

    # --- inside

    def _write(self, once: Once[Result] | None, action: Callable[[Connection], Result]) -> Result:
        """What `action` returns; its writes and the key's answer are one transaction. Raises: Replay, Conflict."""
        with self._database.write() as connection:
            if once is not None:
                idempotency.reserve(connection, once, self._clock())
            result = action(connection)
            if once is not None:
                idempotency.keep(connection, once, result)
            return result

    def _own(self, connection: Connection, job_id: str) -> str:
        """The id of a job that is the project's. Raises: NotFound."""
        return job_rows.get_job(connection, job_id, project=self._project).id

    def _recall(self, once: Once[Any] | None) -> None:
        """Spares a request that was answered before the work ahead of its `_write`. Raises: Replay, Conflict."""
        if once is not None:
            with self._database.read() as connection:
                idempotency.recall(connection, once)

    def _insert_job(self, connection: Connection, spec: JobSpec, dataset: Dataset, model: BaseModel) -> Job:
        """The queued job. Raises: QuotaExceeded."""
        job_id = new_id("job")
        stored = spec.model_copy(update={"dataset": DatasetRef(id=dataset.id)})
        job_rows.insert_job(connection, job_id, self._project, stored, dataset.id, model.weights_sha256, self._clock())
        job = job_rows.get_job(connection, job_id)
        if (
            self._max_queued_jobs is not None
            and job_rows.count_queued(connection, self._project) > self._max_queued_jobs
        ):
            raise QuotaExceeded(
                f"{self._max_queued_jobs} jobs are in the queue, which is as many as may wait: send the request again "
                "when one has started, cancel one, or have QLORA_MAX_QUEUED_JOBS raised",
                max_queued_jobs=self._max_queued_jobs,
            )
        return job

    def _manifest_key(self, job_id: str) -> str:
        job = self.get_job(job_id)
        attempt = job.result["attempt"] if job.result else (job.error or {}).get("details", {}).get("kept_attempt")
        if attempt is None:
            raise Conflict(f"job {job_id} is {job.status}: artifacts exist once a job has succeeded", location="job_id")
        return job_key(job_id, attempt, MANIFEST)

    def _manifest_content(self, key: str) -> bytes:
        return b"".join(self._artifacts.read(key))

    def _source(
        self, spec: JobSpec, upload: Path | None, filename: str | None, scratch: Path
    ) -> tuple[Dataset, Path, bool]:
        """The dataset a job names or brings, a file with its bytes, and whether it is yet to be stored."""
        ref = spec.dataset
        sources = [source for source in (ref.id, ref.rows, upload) if source is not None]
        if len(sources) != 1:
            raise InvalidSpec(
                ("no dataset" if not sources else "more than one dataset")
                + ": give one of dataset.id (from POST /datasets), dataset.rows, or the multipart part `dataset`",
                location="/dataset",
            )
        if ref.id is not None:
            dataset = self.get_dataset(ref.id)
            return dataset, self._local(dataset, scratch), False
        if ref.rows is not None:
            upload = scratch / "rows.jsonl"
            with upload.open("w", encoding="utf-8") as file:
                # ASCII escapes: half a surrogate pair has no UTF-8, and is to be found by the row's check.
                file.writelines(json.dumps(row) + "\n" for row in ref.rows)
        assert upload is not None
        container: Container | None = "jsonl" if ref.rows is not None else ref.container
        return self._checked(upload, filename, container, ref.shape), upload, True

    def _checked(self, path: Path, filename: str | None, container: Container | None, shape: Shape | None) -> Dataset:
        """A dataset that is not stored yet. Raises: InvalidDataset."""
        report = check_dataset(path, filename=filename, container=container, shape=shape)
        return Dataset(new_id("ds"), self._project, describe_file(path).sha256, filename, self._clock(), report)

    def _store_bytes(self, dataset: Dataset, path: Path) -> None:
        # Also when the key is there: after a power cut a file that was never flushed may be there, but torn.
        self._artifacts.put_file(dataset_key(dataset.sha256), path)

    def _local(self, dataset: Dataset, scratch: Path) -> Path:
        return self._artifacts.local_copy(dataset_key(dataset.sha256), scratch)

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self._tmp_dir) as path:
            yield Path(path)

    def _render_report(
        self, dataset: Dataset, path: Path, model: BaseModel, rules: RenderRules, *, keep: bool
    ) -> RenderReport:
        """What rendering the dataset gives; with `keep` from the cache and into it."""
        identity = [model.name, model.weights_sha256, model.imported_at, asdict(rules), CHECKED_ROWS]
        key = hashlib.sha256(json.dumps(identity, default=str).encode()).hexdigest()
        if keep:
            with self._database.read() as connection:
                known = dataset_rows.get_render_report(connection, dataset.id, key)
            if known is not None:
                return RenderReport(**known)
        with Renderer(model.path, rules, self._clock()) as renderer:
            report = render_report(renderer, _examples(dataset, path), CHECKED_ROWS)
        if keep:
            with self._database.write() as connection:
                dataset_rows.put_render_report(connection, dataset.id, key, asdict(report))
        return report


def open_service(
    *,
    database_url: str,
    artifact_url: str,
    models_dir: Path,
    tmp_dir: Path,
    lease_s: float,
    max_queued_jobs: int | None = None,
) -> Service:
    """The service over its stores, with the database's schema brought up to date."""
    database = Database(database_url)
    database.migrate()
    return Service(
        database=database,
        artifacts=ArtifactStore(artifact_url),
        catalog=Catalog(models_dir),
        queue=Queue(database, lease_s=lease_s),
        tmp_dir=tmp_dir,
        max_queued_jobs=max_queued_jobs,
    )


def _standing_metrics(events: Iterable[JobEvent]) -> list[dict[str, Any]]:
    """The records of the steps that the job has done, by step.

    An attempt that resumes from a checkpoint takes back the steps after it, until it has done them again.
    """
    records: dict[tuple[str, int], dict[str, Any]] = {}
    for event in events:
        if event.type in METRICS:
            key = (event.type, event.data["step"])
            records.pop(key, None)  # so that the newest is the last of its step
            records[key] = event.data
        elif (resumed := event.data.get("resumed_from_step")) is not None:
            records = {key: record for key, record in records.items() if key[1] <= resumed}
    return sorted(records.values(), key=lambda record: int(record["step"]))


def _examples(dataset: Dataset, path: Path) -> Iterator[SourceRow]:
    return read_examples(path, dataset.report.container, dataset.report.shape)


def _preview(renderer: Renderer, result: RenderedRow | UnusableRow) -> dict[str, Any]:
    if isinstance(result, UnusableRow):
        return {"line": result.finding.line, "problem": result.finding.reason}
    rejected = None if result.rejected is None else _preview_document(renderer, result.rejected)
    shown = _preview_document(renderer, result)
    return {"line": result.line, **shown, "rejected": rejected, "desirable": result.desirable}


def _preview_document(renderer: Renderer, document: RenderedRow) -> dict[str, Any]:
    tokens = [
        {"id": token_id, "text": renderer.token_text(token_id), "trained": trained}
        for token_id, trained in zip(document.input_ids, document.trained, strict=True)
    ]
    return {"text": document.text, "tokens": tokens, "cut_tokens": document.cut_tokens}
