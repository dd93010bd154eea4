"""Deleting datasets; what else can be done with them is in test_service.py."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_service.actions.service import Service, Stores
from qlora_service.artifacts.store import ArtifactStore, dataset_key
from qlora_service.domain.datasets import Dataset
from qlora_service.errors import Conflict, NotFound, StorageFull
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.queue.queue import Queue
from qlora_service.specs import JobSpec
from qlora_service.store.database import Database
from qlora_service.store.jobs import insert_job
from tests.control_plane import START, SteppedClock


@pytest.fixture
def open_service(database: Database, queue: Queue, clock: SteppedClock, tmp_path: Path) -> Callable[..., Service]:
    """Every service over the same database and files."""

    def open_with(**limits: int) -> Service:
        stores = Stores(
            database=database,
            artifacts=ArtifactStore((tmp_path / "artifacts").as_uri()),
            catalog=Catalog(tmp_path / "models"),
            tmp_dir=tmp_path / "tmp",
            clock=clock,
            **limits,
        )
        return Service.of(stores)

    return open_with


@pytest.fixture
def service(open_service: Callable[..., Service]) -> Service:
    return open_service()


@pytest.fixture
def add(tmp_path: Path) -> Callable[[Service], Dataset]:
    """Adds always the same file."""

    def add_file(service: Service) -> Dataset:
        path = tmp_path / f"{threading.get_ident()}.jsonl"
        path.write_bytes(b'{"text": "hello"}\n')
        return service.datasets.upload(path, filename="rows.jsonl")

    return add_file


def test_bytes_go_with_the_last_dataset_that_has_them(
    service: Service, add: Callable[[Service], Dataset], tmp_path: Path
) -> None:
    other = service.within("other")
    first, second = add(service), add(other)
    stored = tmp_path / "artifacts" / dataset_key(first.sha256)
    service.datasets.delete(first.id)
    assert b"".join(other.datasets.read(second)) == b'{"text": "hello"}\n'
    other.datasets.delete(second.id)
    assert not stored.exists()


def test_deleted_dataset_is_not_there_and_comes_back_with_its_bytes(
    service: Service, add: Callable[[Service], Dataset]
) -> None:
    dataset = add(service)
    assert service.datasets.delete(dataset.id) == dataset
    assert service.datasets.list_datasets() == []
    for again in (service.datasets.get, service.datasets.delete):
        with pytest.raises(NotFound):
            again(dataset.id)
    assert add(service) == dataset
    assert b"".join(service.datasets.read(dataset)) == b'{"text": "hello"}\n'


def test_another_projects_dataset_cannot_be_deleted(service: Service, add: Callable[[Service], Dataset]) -> None:
    dataset = add(service)
    with pytest.raises(NotFound):
        service.within("other").datasets.delete(dataset.id)
    assert service.datasets.list_datasets() == [dataset]


@pytest.mark.parametrize("use", ["train", "judge"])
def test_dataset_is_kept_while_a_job_needs_it(
    service: Service, add: Callable[[Service], Dataset], database: Database, tmp_path: Path, use: str
) -> None:
    dataset = add(service)
    path = tmp_path / "more.jsonl"
    path.write_bytes(b'{"text": "more"}\n')
    more = service.datasets.upload(path, filename=None)
    trained, judged = (dataset, more) if use == "train" else (more, dataset)
    spec = JobSpec.model_validate({"base_model": "tiny", "validation": {"dataset_id": judged.id}})
    with database.write() as connection:
        insert_job(connection, "job_1", "local", spec, trained.id, "0" * 64, START)
    with pytest.raises(Conflict, match="needed by job job_1"):
        service.datasets.delete(dataset.id)
    service.jobs.cancel("job_1")
    service.datasets.delete(dataset.id)


def test_bytes_that_another_project_has_stored_already_need_room_too(
    open_service: Callable[..., Service], add: Callable[[Service], Dataset]
) -> None:
    add(open_service())
    full = open_service(max_stored_bytes=1).within("other")
    with pytest.raises(StorageFull):
        add(full)
    assert full.datasets.list_datasets() == []


def test_bytes_survive_when_one_deletes_and_another_adds(service: Service, add: Callable[[Service], Dataset]) -> None:
    """Whatever comes first: a dataset that is there has its bytes."""
    other = service.within("other")
    for _ in range(4):
        dataset = add(service)
        deleting = threading.Thread(target=service.datasets.delete, args=[dataset.id])
        deleting.start()
        added = add(other)
        deleting.join()
        assert b"".join(other.datasets.read(added)) == b'{"text": "hello"}\n'
        other.datasets.delete(added.id)
