"""What a user can do, one function per action. The API, the command line and the tests all call these."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from qlora_service.actions.plans import PlanActions
from qlora_service.actions.submission import (
    check_fit,
    check_objective,
    check_rows,
    check_trainable,
    fit_default_length,
    submission_warnings,
)
from qlora_service.artifacts.manifest import NAME as MANIFEST
from qlora_service.artifacts.manifest import Manifest, ManifestFile
from qlora_service.artifacts.store import ArtifactStore, job_key
from qlora_service.data.rendering.renderer import RenderReport, RenderRules
from qlora_service.data.rows.examples import Container
from qlora_service.domain.clock import utc_now
from qlora_service.domain.datasets import Dataset
from qlora_service.domain.ids import new_id
from qlora_service.domain.jobs import Job, JobEvent, JobStatus
from qlora_service.domain.keys import LOCAL_PROJECT
from qlora_service.domain.metrics import METRICS, standing_metrics
from qlora_service.domain.tuned_models import job_id_in, tuned_model_name
from qlora_service.errors import Conflict, InvalidSpec, NotFound, QuotaExceeded, Unavailable
from qlora_service.models.catalog.catalog import BaseModel, Catalog
from qlora_service.planning.plan import Plan
from qlora_service.planning.planner import AUTO, Planner
from qlora_service.planning.time.duration import Work
from qlora_service.queue.queue import Queue
from qlora_service.specs import DatasetRef, JobSpec
from qlora_service.store import datasets as dataset_rows
from qlora_service.store import jobs as job_rows
from qlora_service.store.database import Database
from qlora_service.store.idempotency import Once
from qlora_service.store.queue_times import seconds_to_end

VALIDATION_PLACE = "/validation/dataset_id"


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


class Service(PlanActions):
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
        planner: Planner | None = None,
        clock: Callable[[], datetime] = utc_now,
        max_queued_jobs: int | None = None,
        max_stored_bytes: int | None = None,
        project: str = LOCAL_PROJECT,
    ) -> None:
        """`max_queued_jobs` is how many jobs of one project may wait, `max_stored_bytes` how much of it is kept."""
        super().__init__(
            database=database,
            artifacts=artifacts,
            catalog=catalog,
            tmp_dir=tmp_dir,
            clock=clock,
            max_stored_bytes=max_stored_bytes,
            project=project,
        )
        self._queue = queue
        self._planner = planner or Planner()
        self._max_queued_jobs = max_queued_jobs

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

    # --- jobs

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

        What can be known to fail is refused here, and then nothing is stored. With `force`, a job that should not fit
        the device is queued with a warning.

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
            judged = self._check_validation(spec, dataset, model, scratch)
            work = Work.of(spec, report, dataset_rows=dataset.report.usable_rows, validation=judged)
            forecast = self._forecast(spec, model, report, work, force=force)
            if is_new:
                self._check_room_for(dataset)
                self._store_bytes(dataset, path)

            def insert(connection: Connection) -> Submission:
                if is_new:
                    stored = self._insert_dataset(connection, dataset, path)
                    self._check_room(connection)
                else:  # again, and locked: it may have been deleted since it was checked
                    stored = self._named(connection, dataset.id, "/dataset/id", lock=True)
                if spec.validation.dataset_id is not None:
                    self._named(connection, spec.validation.dataset_id, VALIDATION_PLACE, lock=True)
                job = self._insert_job(connection, spec, stored, model, forecast)
                warnings = submission_warnings(report, stored, spec, forecast)
                return Submission(job, job_rows.count_ahead(connection, job), warnings)

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

    def queue_positions(self, jobs: Iterable[Job]) -> dict[str, int]:
        """The same of every queued one among the jobs of a page, by id."""
        queued = [job.id for job in jobs if job.status is JobStatus.QUEUED]
        if not queued:
            return {}
        with self._database.read() as connection:
            return job_rows.places_in_queue(connection, queued)

    def seconds_to_end(self, jobs: Iterable[Job]) -> dict[str, float]:
        """Until each of the queued ones among the jobs ends, by id; where somebody ahead has no forecast, nothing."""
        queued = {job.id for job in jobs if job.status is JobStatus.QUEUED}
        if not queued:
            return {}
        with self._database.read() as connection:
            return seconds_to_end(connection, queued)

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
        """Jobs whose ids lie between the two given.

        With `metadata` those that have all of these pairs; of an empty one, those without any.
        """
        with self._database.read() as connection:
            return job_rows.list_jobs(
                connection,
                project=self._project,
                status=status,
                base_model=base_model,
                metadata=metadata,
                before=before,
                after=after,
                oldest_first=oldest_first,
                limit=limit,
            )

    def list_published(self, *, limit: int) -> list[Job]:
        """Succeeded jobs whose adapters were not withdrawn, newest first."""
        with self._database.read() as connection:
            return job_rows.list_published(connection, project=self._project, limit=limit)

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
        """The job, queued again, or running on if its pause had not come about yet.

        Raises:
            NotFound, Conflict.
            QuotaExceeded: the project has as many jobs in the queue as may wait.
        """

        def enqueue(connection: Connection) -> Submission:
            job = self._queue.resume(connection, self._own(connection, job_id))
            queued = job.status is JobStatus.QUEUED
            if queued:
                self._check_queue(connection)
            return Submission(job, job_rows.count_ahead(connection, job) if queued else None)

        return self._write(once, enqueue)

    def get_tuned_model(self, name: str) -> Job:
        """The job whose adapter is called so, and can be had. Raises: NotFound."""
        with self._database.read() as connection:
            return self._tuned(connection, name)

    def job_events(self, job_id: str, after: int = 0, limit: int | None = None) -> list[JobEvent]:
        """Events after sequence number `after`, oldest first. Raises: NotFound."""
        with self._database.read() as connection:
            job_rows.get_job(connection, job_id, project=self._project)
            return job_rows.events_after(connection, job_id, after, limit=limit)

    def project_events(self, after: int, *, types: Collection[str] | None = None, limit: int) -> list[JobEvent]:
        """Up to `limit` events of any job after sequence number `after`, oldest first."""
        with self._database.read() as connection:
            return job_rows.project_events_after(connection, self._project, after, types=types, limit=limit)

    def job_events_before(self, job_id: str, before: int | None, *, types: Sequence[str], limit: int) -> list[JobEvent]:
        """Events before sequence number `before`, newest first. Raises: NotFound."""
        with self._database.read() as connection:
            job_rows.get_job(connection, job_id, project=self._project)
            return job_rows.events_before(connection, job_id, before, types=types, limit=limit)

    def job_metrics(self, job_id: str) -> list[dict[str, Any]]:
        """One record per step and evaluation that the job has done, over all attempts, by step. Raises: NotFound."""
        with self._database.read() as connection:
            job_rows.get_job(connection, job_id, project=self._project)
            events = job_rows.events_after(connection, job_id, types=("log", *METRICS))
        return standing_metrics(events)

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

    def withdraw_model(self, name: str, *, once: Once[Job] | None = None) -> Job:
        """The job of a fine-tuned model, whose files are gone for good; what is known of it stays. Raises: NotFound."""

        def withdraw(connection: Connection) -> Job:
            job = self._tuned(connection, name, lock=True)
            job_rows.mark_withdrawn(connection, job.id, self._clock())
            # Before the commit: a crash in between leaves a model that can be deleted again, never files without one.
            self._artifacts.remove_attempts(job.id, keep=None)
            return job_rows.get_job(connection, job.id)

        return self._write(once, withdraw)

    # --- inside

    def _own(self, connection: Connection, job_id: str) -> str:
        """The id of a job that is the project's. Raises: NotFound."""
        return job_rows.get_job(connection, job_id, project=self._project).id

    def _tuned(self, connection: Connection, name: str, *, lock: bool = False) -> Job:
        """The job of a fine-tuned model. Raises: NotFound."""
        job_id = job_id_in(name)
        if job_id is not None:
            with suppress(NotFound):
                job = job_rows.get_job(connection, job_id, project=self._project, lock=lock)
                if tuned_model_name(job) == name and job.withdrawn_at is None:
                    return job
        raise NotFound(f"there is no model {name[:100]!r}; GET /v1/models lists them", location="model")

    def _insert_job(
        self, connection: Connection, spec: JobSpec, dataset: Dataset, model: BaseModel, forecast: Plan | None
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
        self._check_queue(connection)
        return job_rows.get_job(connection, job_id)

    def _check_queue(self, connection: Connection) -> None:
        """Raises: QuotaExceeded, when more of the project's jobs wait than may."""
        if (
            self._max_queued_jobs is not None
            and job_rows.count_queued(connection, self._project) > self._max_queued_jobs
        ):
            raise QuotaExceeded(
                f"{self._max_queued_jobs} jobs are in the queue, which is as many as may wait: send the request again "
                "when one has started, cancel one, or have QLORA_MAX_QUEUED_JOBS raised",
                max_queued_jobs=self._max_queued_jobs,
            )

    def _manifest_key(self, job_id: str) -> str:
        return job_key(job_id, self._published_attempt(self.get_job(job_id)), MANIFEST)

    def _published_attempt(self, job: Job) -> int:
        """The attempt whose files can be had. Raises: Conflict."""
        if job.withdrawn_at is not None:
            raise Conflict(
                f"the adapter of job {job.id} was deleted at {job.withdrawn_at:%Y-%m-%d %H:%M} UTC: post the job again "
                "to train it anew",
                location="job_id",
            )
        if job.published_attempt is None:
            raise Conflict(f"job {job.id} is {job.status}: artifacts exist once a job has succeeded", location="job_id")
        return job.published_attempt

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

    def _named(self, connection: Connection, dataset_id: str, place: str, *, lock: bool = False) -> Dataset:
        """The dataset that a spec names at `place`. Raises: NotFound."""
        try:
            return dataset_rows.get_dataset(connection, dataset_id, project=self._project, lock=lock)
        except NotFound as error:
            error.location = place
            raise

    def _check_validation(
        self, spec: JobSpec, dataset: Dataset, model: BaseModel, scratch: Path
    ) -> RenderReport | None:
        """What rendering the dataset to judge with gives; None without one.

        Raises:
            NotFound, InvalidSpec, InvalidDataset: it cannot be used.
        """
        wanted = spec.validation.dataset_id
        if wanted is None:
            return None
        with self._database.read() as connection:
            judged = self._named(connection, wanted, VALIDATION_PLACE)
        if judged.sha256 == dataset.sha256:
            raise InvalidSpec(
                "the job would be judged with the rows that it is trained on: name another dataset, or leave it out, "
                "and validation.fraction of the rows is held out",
                location=VALIDATION_PLACE,
            )
        check_objective(spec, judged.report.shape, VALIDATION_PLACE)
        rules = RenderRules.of(spec.training)
        report = self._render_report(judged, self._local(judged, scratch), model, rules, keep=True)
        check_rows(report, spec, model, VALIDATION_PLACE)
        return report


def open_service(
    *,
    database_url: str,
    artifact_url: str,
    models_dir: Path,
    tmp_dir: Path,
    lease_s: float,
    max_queued_jobs: int | None = None,
    max_stored_bytes: int | None = None,
    plan_device: str = AUTO,
    plan_cache_dir: Path | None = None,
) -> Service:
    """The service over its stores, with the database's schema brought up to date.

    Raises:
        InvalidRequest: there is no such `plan_device`.
    """
    database = Database(database_url)
    database.migrate()
    return Service(
        database=database,
        artifacts=ArtifactStore(artifact_url),
        catalog=Catalog(models_dir),
        queue=Queue(database, lease_s=lease_s),
        planner=Planner(plan_device, plan_cache_dir),
        tmp_dir=tmp_dir,
        max_queued_jobs=max_queued_jobs,
        max_stored_bytes=max_stored_bytes,
    )
