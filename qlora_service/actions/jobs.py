"""Jobs: submit, look up, pause, resume, cancel; their events and metrics."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Connection

from qlora_service.actions.dataset_storage import DatasetStorage
from qlora_service.actions.plans import Plans
from qlora_service.actions.rendering import Rendering
from qlora_service.actions.submission import (
    CheckedRows,
    check_fit,
    check_objective,
    check_rows,
    check_trainable,
    fit_defaults,
    submission_warnings,
)
from qlora_service.data.rendering.renderer import RenderRules
from qlora_service.data.rendering.report import RenderReport
from qlora_service.domain.clock import Clock
from qlora_service.domain.datasets import Dataset
from qlora_service.domain.ids import new_id
from qlora_service.domain.jobs import Job, JobEvent, JobStatus
from qlora_service.domain.metrics import METRICS, valid_metrics
from qlora_service.errors import InvalidSpec, QuotaExceeded
from qlora_service.models.catalog.catalog import BaseModel, Catalog
from qlora_service.planning.plan import Plan
from qlora_service.planning.time.duration import Work
from qlora_service.queue.requests import request_cancel, request_pause, request_resume
from qlora_service.specs import Container, DatasetRef, JobSpec
from qlora_service.store import jobs as job_rows
from qlora_service.store.database import Database
from qlora_service.store.idempotency import Once, recall, write_once
from qlora_service.store.pages import PageRequest
from qlora_service.store.queue_times import seconds_to_end

TRAINING_LOCATION = "/dataset/id"
VALIDATION_LOCATION = "/validation/dataset_id"


@dataclass(frozen=True)
class Submission:
    """A queued job and its place in the queue."""

    job: Job
    queue_position: int | None
    """Jobs that run before this one; None when it is running already."""


@dataclass(frozen=True)
class _Source:
    """The dataset that a job names or brings, and a local file with its bytes."""

    dataset: Dataset
    path: Path
    is_new: bool
    """Not stored yet"""


class Jobs:
    """The jobs of one project."""

    def __init__(
        self,
        database: Database,
        catalog: Catalog,
        storage: DatasetStorage,
        rendering: Rendering,
        plans: Plans,
        project: str,
        clock: Clock,
        *,
        max_queued_jobs: int | None,
    ) -> None:
        """`max_queued_jobs` bounds the project's jobs in the queue; None for no bound."""
        self._database = database
        self._catalog = catalog
        self._storage = storage
        self._rendering = rendering
        self._plans = plans
        self._project = project
        self._clock = clock
        self._max_queued_jobs = max_queued_jobs

    def submit(
        self,
        spec: JobSpec,
        upload: Path | None = None,
        filename: str | None = None,
        *,
        force: bool = False,
        once: Once[Submission] | None = None,
    ) -> Submission:
        """A queued job on a stored dataset, on the spec's inline rows, or on the file at `upload`.

        A job that is known to fail is refused, and nothing is stored. With `force`, a job that is not expected to fit
        the device is queued with a warning.

        Raises:
            InvalidSpec, InvalidModel, InvalidDataset, NotFound: with the location and what to do.
            QuotaExceeded: the project has as many queued jobs as it may.
            StorageFull: the project would store more than it may.
        """
        recall(self._database, once)
        model = self._catalog.get(spec.base_model)
        spec = fit_defaults(spec, model)
        check_fit(spec, model, self._catalog.module_shapes(model))
        with self._storage.scratch() as scratch:
            source = self._source(spec, upload, filename, scratch)
            dataset = source.dataset
            check_objective(spec, dataset.report.shape)
            report = self._render(source, model, RenderRules.of(spec.training))
            check_trainable(report, spec, model)
            self._rendering.check_questions(spec, model)
            validation = self._check_validation(spec, dataset, model)
            held_out = None if validation is None else validation.rendered
            work = Work.of(spec, report, dataset_rows=dataset.report.usable_rows, validation=held_out)
            attachment = self._plans.attachment(spec, model)
            forecast = self._plans.forecast(spec, model, report, work, force=force)
            warnings = submission_warnings(CheckedRows(dataset.report, report), validation, forecast, attachment)
            if source.is_new:
                self._storage.check_room_for(dataset)
                self._storage.store_bytes(dataset, source.path)

            def insert(connection: Connection) -> Submission:
                stored = self._insert_source(connection, source)
                if spec.validation.dataset_id is not None:
                    self._storage.find(connection, spec.validation.dataset_id, VALIDATION_LOCATION, lock=True)
                job = self._insert_job(connection, spec, stored, model, forecast, warnings)
                return Submission(job, job_rows.count_ahead(connection, job))

            return write_once(self._database, once, self._clock(), insert)

    def get(self, job_id: str) -> Job:
        """Raises: NotFound."""
        with self._database.read() as connection:
            return job_rows.get_job(connection, job_id, project=self._project)

    def list_jobs(
        self,
        *,
        status: JobStatus | None = None,
        base_model: str | None = None,
        metadata: Mapping[str, str] | None = None,
        before: str | None = None,
        after: str | None = None,
        oldest_first: bool = False,
        limit: int = 20,
    ) -> list[Job]:
        """Jobs whose ids lie between `after` and `before`.

        `metadata` selects jobs with all of these pairs; an empty mapping selects jobs without metadata.
        """
        with self._database.read() as connection:
            return job_rows.list_jobs(
                connection,
                PageRequest(limit, before, after, oldest_first),
                project=self._project,
                status=status,
                base_model=base_model,
                metadata=metadata,
            )

    def queue_position(self, job: Job) -> int | None:
        """Jobs that run before this queued one; None for a job that is not queued."""
        if job.status is not JobStatus.QUEUED:
            return None
        with self._database.read() as connection:
            return job_rows.count_ahead(connection, job)

    def queue_positions(self, jobs: Iterable[Job]) -> dict[str, int]:
        """`queue_position` of every queued job among `jobs`, by id, in one query."""
        queued = [job.id for job in jobs if job.status is JobStatus.QUEUED]
        if not queued:
            return {}
        with self._database.read() as connection:
            return job_rows.places_in_queue(connection, queued)

    def seconds_to_end(self, jobs: Iterable[Job]) -> dict[str, float]:
        """Seconds until each queued job among `jobs` ends, by id; a job behind one without a forecast is left out."""
        queued = {job.id for job in jobs if job.status is JobStatus.QUEUED}
        if not queued:
            return {}
        with self._database.read() as connection:
            return seconds_to_end(connection, queued)

    def cancel(self, job_id: str, *, once: Once[Job] | None = None) -> Job:
        """The job: cancelled, or asked to stop at its next step boundary. Raises: NotFound, Conflict."""

        def cancel(connection: Connection) -> Job:
            return request_cancel(connection, self._owned_id(connection, job_id), self._clock())

        return write_once(self._database, once, self._clock(), cancel)

    def pause(self, job_id: str, *, once: Once[Job] | None = None) -> Job:
        """The job: paused, or asked to stop at its next step boundary. Raises: NotFound, Conflict."""

        def pause(connection: Connection) -> Job:
            return request_pause(connection, self._owned_id(connection, job_id), self._clock())

        return write_once(self._database, once, self._clock(), pause)

    def resume(self, job_id: str, *, once: Once[Submission] | None = None) -> Submission:
        """The job: queued again, or still running when its pause had not taken effect.

        Raises:
            NotFound, Conflict.
            QuotaExceeded: the project has as many queued jobs as it may.
        """

        def enqueue(connection: Connection) -> Submission:
            job = request_resume(connection, self._owned_id(connection, job_id), self._clock())
            queued = job.status is JobStatus.QUEUED
            if queued:
                self._check_queue(connection)
            return Submission(job, job_rows.count_ahead(connection, job) if queued else None)

        return write_once(self._database, once, self._clock(), enqueue)

    def events(self, job_id: str, after: int = 0, limit: int | None = None) -> list[JobEvent]:
        """Events after sequence number `after`, oldest first. Raises: NotFound."""
        with self._database.read() as connection:
            job_rows.get_job(connection, job_id, project=self._project)
            return job_rows.events_after(connection, job_id, after, limit=limit)

    def events_before(self, job_id: str, before: int | None, *, types: Sequence[str], limit: int) -> list[JobEvent]:
        """Events before sequence number `before`, newest first. Raises: NotFound."""
        with self._database.read() as connection:
            job_rows.get_job(connection, job_id, project=self._project)
            return job_rows.events_before(connection, job_id, before, types=types, limit=limit)

    def project_events(self, after: int, *, types: Collection[str] | None = None, limit: int) -> list[JobEvent]:
        """Up to `limit` events of any job after sequence number `after`, oldest first."""
        with self._database.read() as connection:
            return job_rows.project_events_after(connection, self._project, after, types=types, limit=limit)

    def metrics(self, job_id: str) -> list[dict[str, Any]]:
        """One record per step and per evaluation over all attempts, by step. Raises: NotFound."""
        with self._database.read() as connection:
            job_rows.get_job(connection, job_id, project=self._project)
            events = job_rows.events_after(connection, job_id, types=("log", *METRICS))
        return valid_metrics(events)

    def _source(self, spec: JobSpec, upload: Path | None, filename: str | None, scratch: Path) -> _Source:
        """Raises: InvalidSpec, NotFound, InvalidDataset."""
        ref = spec.dataset
        sources = [source for source in (ref.id, ref.rows, upload) if source is not None]
        if len(sources) != 1:
            raise InvalidSpec(
                ("no dataset" if not sources else "more than one dataset")
                + ": give one of dataset.id (from POST /datasets), dataset.rows, or the multipart part `dataset`",
                location="/dataset",
            )
        if ref.id is not None:
            with self._database.read() as connection:
                dataset = self._storage.find(connection, ref.id, TRAINING_LOCATION)
            return _Source(dataset, self._storage.local_copy(dataset, scratch), is_new=False)
        if ref.rows is not None:
            upload = scratch / "rows.jsonl"
            with upload.open("w", encoding="utf-8") as file:
                # ASCII escapes: a lone surrogate has no UTF-8, and the row's check is to report it.
                file.writelines(json.dumps(row) + "\n" for row in ref.rows)
        assert upload is not None
        container: Container | None = "jsonl" if ref.rows is not None else ref.container
        return _Source(self._storage.check(upload, filename, container, ref.shape), upload, is_new=True)

    def _render(self, source: _Source, model: BaseModel, rules: RenderRules) -> RenderReport:
        if source.is_new:
            return self._rendering.report(source.dataset, source.path, model, rules)
        return self._rendering.stored_report(source.dataset, model, rules)

    def _check_validation(self, spec: JobSpec, dataset: Dataset, model: BaseModel) -> CheckedRows | None:
        """The rows of the validation dataset; None when the spec names none.

        Raises:
            NotFound, InvalidSpec, InvalidDataset: it cannot be used.
        """
        if spec.validation.dataset_id is None:
            return None
        with self._database.read() as connection:
            validation = self._storage.find(connection, spec.validation.dataset_id, VALIDATION_LOCATION)
        if validation.sha256 == dataset.sha256:
            raise InvalidSpec(
                "the validation rows are the training rows: name another dataset, or leave it out, and "
                "validation.fraction of the rows is held out",
                location=VALIDATION_LOCATION,
            )
        check_objective(spec, validation.report.shape, VALIDATION_LOCATION)
        report = self._rendering.stored_report(validation, model, RenderRules.of(spec.training))
        check_rows(report, spec, model, VALIDATION_LOCATION)
        return CheckedRows(validation.report, report)

    def _insert_source(self, connection: Connection, source: _Source) -> Dataset:
        """The stored dataset. Raises: StorageFull; NotFound, when it was deleted after it was checked."""
        if not source.is_new:
            return self._storage.find(connection, source.dataset.id, TRAINING_LOCATION, lock=True)
        stored = self._storage.insert(connection, source.dataset, source.path)
        self._storage.check_room(connection)
        return stored

    def _insert_job(
        self,
        connection: Connection,
        spec: JobSpec,
        dataset: Dataset,
        model: BaseModel,
        forecast: Plan | None,
        warnings: Sequence[str],
    ) -> Job:
        """The queued job. Raises: QuotaExceeded."""
        job_id = new_id("job")
        stored = spec.model_copy(update={"dataset": DatasetRef(id=dataset.id)})
        job_rows.insert_job(
            connection,
            job_id,
            self._project,
            stored,
            dataset.id,
            model.weights_sha256,
            self._clock(),
            forecast=None if forecast is None else forecast.as_dict(),
        )
        job_rows.add_warnings(connection, job_id, warnings, self._clock())
        self._check_queue(connection)
        return job_rows.get_job(connection, job_id)

    def _check_queue(self, connection: Connection) -> None:
        """Raises: QuotaExceeded, when the project has more queued jobs than it may."""
        limit = self._max_queued_jobs
        if limit is not None and job_rows.count_queued(connection, self._project) > limit:
            raise QuotaExceeded(
                f"{limit} jobs are in the queue, which is as many as may wait: send the request again when one has "
                "started, cancel one, or ask the operator to raise QLORA_MAX_QUEUED_JOBS",
                max_queued_jobs=limit,
            )

    def _owned_id(self, connection: Connection, job_id: str) -> str:
        """`job_id`, if the job is the project's. Raises: NotFound."""
        return job_rows.get_job(connection, job_id, project=self._project).id
