import hashlib

import pytest

from qlora_service.actions.service import Service
from qlora_service.domain.jobs import Job
from qlora_service.errors import Conflict, NotFound
from qlora_service.queue.queue import Queue
from tests.control_plane import claim_next
from tests.qlora_service.actions._submissions import ROWS, submit


def test_published_files_are_listed_with_the_manifest_last(service: Service, published: Job) -> None:
    listed = service.artifacts.list_files(published.id)
    assert [artifact.file.name for artifact in listed] == ["adapter_model.safetensors", "README.md", "manifest.json"]
    for artifact in listed:
        assert service.artifacts.get(published.id, artifact.file.name) == artifact
        data = b"".join(service.artifacts.read(artifact))
        assert (len(data), hashlib.sha256(data).hexdigest()) == (artifact.file.bytes, artifact.file.sha256)
    assert service.artifacts.manifest(published.id).attempt == 2


def test_part_of_a_published_file_is_read(service: Service, published: Job) -> None:
    artifact = service.artifacts.get(published.id, "adapter_model.safetensors")
    assert b"".join(service.artifacts.read(artifact, 3, 12)) == (b"weights" * 100)[3:12]


@pytest.mark.parametrize("name", ["nothing", "../1/adapter_model.safetensors", "", "/etc/passwd", "..", "%2e%2e"])
def test_only_files_in_the_manifest_are_artifacts(service: Service, published: Job, name: str) -> None:
    with pytest.raises(NotFound, match=r"it published adapter_model\.safetensors, README\.md, manifest\.json"):
        service.artifacts.get(published.id, name)


@pytest.mark.parametrize("state", ["queued", "running", "failed", "cancelled"])
def test_job_that_has_not_succeeded_has_no_artifacts(service: Service, queue: Queue, state: str) -> None:
    job = submit(service, dataset={"rows": ROWS}).job
    if state != "queued":
        claim = claim_next(queue)
    if state == "failed":
        queue.fail(claim, {"code": "job_failed"})
    elif state == "cancelled":
        queue.cancelled(claim)
    for read in (
        service.artifacts.manifest,
        service.artifacts.list_files,
        lambda job_id: service.artifacts.get(job_id, "README.md"),
    ):
        with pytest.raises(Conflict, match=f"job {job.id} is {state}"):
            read(job.id)
        with pytest.raises(NotFound):
            read("job_none")
