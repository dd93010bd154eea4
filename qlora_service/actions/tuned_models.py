"""Adapters of succeeded jobs as models with names (`domain.tuned_models`)."""

from __future__ import annotations

from contextlib import suppress

from sqlalchemy.engine import Connection

from qlora_service.artifacts.store import ArtifactStore
from qlora_service.domain.clock import Clock
from qlora_service.domain.jobs import Job
from qlora_service.domain.tuned_models import job_id_in, tuned_model_name
from qlora_service.errors import NotFound
from qlora_service.store import jobs as job_rows
from qlora_service.store.database import Database
from qlora_service.store.idempotency import Once, write_once


class TunedModels:
    """The fine-tuned models of one project."""

    def __init__(self, database: Database, artifacts: ArtifactStore, project: str, clock: Clock) -> None:
        self._database = database
        self._artifacts = artifacts
        self._project = project
        self._clock = clock

    def list_models(self, *, limit: int) -> list[Job]:
        """Succeeded jobs whose adapters were not deleted, newest first."""
        with self._database.read() as connection:
            return job_rows.list_published(connection, project=self._project, limit=limit)

    def get(self, name: str) -> Job:
        """The job whose adapter has this name. Raises: NotFound, also when the adapter was deleted."""
        with self._database.read() as connection:
            return self._find(connection, name)

    def delete(self, name: str, *, once: Once[Job] | None = None) -> Job:
        """The model's job; its files are removed, its row and metrics stay. Raises: NotFound."""

        def delete(connection: Connection) -> Job:
            job = self._find(connection, name, lock=True)
            job_rows.mark_withdrawn(connection, job.id, self._clock())
            # Files before the commit: a crash in between leaves a model that can be deleted again, not orphaned files.
            self._artifacts.remove_attempts(job.id, keep=None)
            return job_rows.get_job(connection, job.id)

        return write_once(self._database, once, self._clock(), delete)

    def _find(self, connection: Connection, name: str, *, lock: bool = False) -> Job:
        """Raises: NotFound."""
        job_id = job_id_in(name)
        if job_id is not None:
            with suppress(NotFound):
                job = job_rows.get_job(connection, job_id, project=self._project, lock=lock)
                if tuned_model_name(job) == name and job.withdrawn_at is None:
                    return job
        raise NotFound(f"there is no model {name[:100]!r}; GET /v1/models lists them", location="model")
