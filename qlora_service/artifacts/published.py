"""Download of a published adapter."""

from __future__ import annotations

from pathlib import Path

from qlora_service.artifacts.manifest import Manifest, describe_file
from qlora_service.artifacts.store import ArtifactStore, job_key
from qlora_service.domain.jobs import FailureReason
from qlora_service.errors import JobFailed


def fetch_published(manifest: Manifest, artifacts: ArtifactStore, directory: Path) -> None:
    """Copies every file of the manifest from the store into `directory`, and verifies it.

    Raises:
        JobFailed: a file differs from the manifest in size or SHA-256.
    """
    for file in manifest.files:
        path = directory / file.name
        artifacts.fetch(job_key(manifest.job_id, manifest.attempt, file.name), path)
        if describe_file(path) != file:
            raise JobFailed(
                f"artifact {file.name} does not have the bytes that were published: the disk or store is faulty",
                reason=FailureReason.CERTIFICATE,
            )
