"""Deletion of datasets, and the bytes that several datasets share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_service.actions.service import Service
from qlora_service.artifacts.store import dataset_key
from qlora_service.domain.datasets import Dataset
from qlora_service.errors import Conflict, NotFound, StorageFull
from qlora_service.specs import JobSpec
from qlora_service.store.database import Database
from qlora_service.store.jobs import insert_job
from tests.control_plane import START


@pytest.fixture
def add(tmp_path: Path) -> Callable[[Service], Dataset]:
    """Uploads the same file with every call."""

    def add_file(service: Service) -> Dataset:
        path = tmp_path / f"{threading.get_ident()}.jsonl"
        path.write_bytes(b'{"text": "hello"}\n')
        return service.datasets.upload(path, filename="rows.jsonl")

    return add_file


def test_bytes_are_deleted_with_their_last_dataset(
    service: Service, add: Callable[[Service], Dataset], tmp_path: Path
) -> None:
    other = service.within("other")
    first, second = add(service), add(other)
    stored = tmp_path / "artifacts" / dataset_key(first.sha256)
    service.datasets.delete(first.id)
    assert b"".join(other.datasets.read(second)) == b'{"text": "hello"}\n'
    other.datasets.delete(second.id)
    assert not stored.exists()


def test_deleted_dataset_is_not_found_until_it_is_uploaded_again(
    service: Service, add: Callable[[Service], Dataset]
) -> None:
    dataset = add(service)
    assert service.datasets.delete(dataset.id) == dataset
    assert service.datasets.list_datasets() == []
    for action in (service.datasets.get, service.datasets.delete):
        with pytest.raises(NotFound):
            action(dataset.id)
    assert add(service) == dataset
    assert b"".join(service.datasets.read(dataset)) == b'{"text": "hello"}\n'


def test_another_projects_dataset_cannot_be_deleted(service: Service, add: Callable[[Service], Dataset]) -> None:
    dataset = add(service)
    with pytest.raises(NotFound):
        service.within("other").datasets.delete(dataset.id)
    assert service.datasets.list_datasets() == [dataset]


@pytest.mark.parametrize("use", ["training", "validation"])
def test_dataset_cannot_be_deleted_while_a_job_needs_it(
    service: Service, add: Callable[[Service], Dataset], database: Database, tmp_path: Path, use: str
) -> None:
    dataset = add(service)
    path = tmp_path / "other.jsonl"
    path.write_bytes(b'{"text": "other"}\n')
    other = service.datasets.upload(path, filename=None)
    training, validation = (dataset, other) if use == "training" else (other, dataset)
    spec = JobSpec.model_validate({"base_model": "tiny", "validation": {"dataset_id": validation.id}})
    with database.write() as connection:
        insert_job(connection, "job_1", "local", spec, training.id, "0" * 64, START)
    with pytest.raises(Conflict, match="needed by job job_1"):
        service.datasets.delete(dataset.id)
    service.jobs.cancel("job_1")
    service.datasets.delete(dataset.id)


def test_bytes_that_another_project_has_stored_count_for_each_project(
    make_service: Callable[..., Service], add: Callable[[Service], Dataset]
) -> None:
    add(make_service())
    full = make_service(max_stored_bytes=1).within("other")
    with pytest.raises(StorageFull):
        add(full)
    assert full.datasets.list_datasets() == []


def test_bytes_survive_a_concurrent_deletion_and_upload(service: Service, add: Callable[[Service], Dataset]) -> None:
    """A stored dataset has its bytes, in whichever order the two run."""
    other = service.within("other")
    for _ in range(4):
        dataset = add(service)
        deleting = threading.Thread(target=service.datasets.delete, args=[dataset.id])
        deleting.start()
        added = add(other)
        deleting.join()
        assert b"".join(other.datasets.read(added)) == b'{"text": "hello"}\n'
        other.datasets.delete(added.id)
