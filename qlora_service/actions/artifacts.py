"""Published files of jobs: list, describe, read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from qlora_service.artifacts.manifest import MANIFEST_NAME, Manifest, ManifestFile
from qlora_service.artifacts.store import ArtifactStore, job_key
from qlora_service.domain.jobs import Job
from qlora_service.errors import Conflict, NotFound
from qlora_service.store.database import Database
from qlora_service.store.jobs import get_job


@dataclass(frozen=True)
class Artifact:
    """A published file: its entry in the manifest, and its key in the artifact store."""

    file: ManifestFile
    key: str


class Artifacts:
    """The published files of one project's jobs."""

    def __init__(self, database: Database, artifacts: ArtifactStore, project: str) -> None:
        self._database = database
        self._artifacts = artifacts
        self._project = project

    def manifest(self, job_id: str) -> Manifest:
        """The manifest of a job's certified adapter, or of what its last finite step left when it failed.

        Raises:
            NotFound: no such job.
            Conflict: the job has not succeeded, or its adapter was deleted.
        """
        return Manifest.model_validate_json(self._read_all(self._manifest_key(job_id)))

    def list_files(self, job_id: str) -> list[Artifact]:
        """Every published file, the manifest last. Raises: NotFound, Conflict."""
        key = self._manifest_key(job_id)
        content = self._read_all(key)
        manifest = Manifest.model_validate_json(content)
        own_entry = ManifestFile(name=MANIFEST_NAME, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        files = [Artifact(file, job_key(job_id, manifest.attempt, file.name)) for file in manifest.files]
        return [*files, Artifact(own_entry, key)]

    def get(self, job_id: str, name: str) -> Artifact:
        """Raises: NotFound, Conflict."""
        published = {artifact.file.name: artifact for artifact in self.list_files(job_id)}
        if name not in published:
            raise NotFound(f"job {job_id} published no {name!r}; it published {', '.join(published)}", location="name")
        return published[name]

    def read(self, artifact: Artifact, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes [start, end) of a published file, in chunks."""
        return self._artifacts.read(artifact.key, start, end)

    def _manifest_key(self, job_id: str) -> str:
        with self._database.read() as connection:
            job = get_job(connection, job_id, project=self._project)
        return job_key(job_id, _published_attempt(job), MANIFEST_NAME)

    def _read_all(self, key: str) -> bytes:
        return b"".join(self._artifacts.read(key))


def _published_attempt(job: Job) -> int:
    """Raises: Conflict, when nothing can be downloaded."""
    if job.withdrawn_at is not None:
        raise Conflict(
            f"the adapter of job {job.id} was deleted at {job.withdrawn_at:%Y-%m-%d %H:%M} UTC: post the job again "
            "to train it again",
            location="job_id",
        )
    if job.published_attempt is None:
        raise Conflict(f"job {job.id} is {job.status}: artifacts exist once a job has succeeded", location="job_id")
    return job.published_attempt
