from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa

from qlora_service.domain.datasets import Dataset, DatasetReport
from qlora_service.errors import Finding, NotFound
from qlora_service.store.database import Database
from qlora_service.store.datasets import (
    all_needed_bytes,
    are_bytes_needed,
    first_stored_at,
    get_dataset,
    get_render_report,
    insert_dataset,
    list_datasets,
    lock_bytes,
    mark_deleted,
    put_render_report,
)
from qlora_service.store.pages import PageRequest
from qlora_service.store.tables import datasets
from tests.control_plane import START, new_dataset, stored_rows


def insert(database: Database, dataset: Dataset) -> Dataset:
    with database.write() as connection:
        return insert_dataset(connection, dataset)


def test_dataset_is_returned_as_it_was_stored(database: Database) -> None:
    findings = (Finding("bad", "/messages/0", 2, 17), Finding("worse", line=3))
    report = DatasetReport("csv", "alpaca", bytes=99, rows=5, usable_rows=3, finding_count=2, findings=findings)
    dataset = Dataset("ds_1", "local", "a" * 64, None, START, report)
    assert insert(database, dataset) == dataset
    with database.read() as connection:
        assert get_dataset(connection, "ds_1") == dataset


def test_same_bytes_in_the_same_format_are_one_dataset(database: Database) -> None:
    first = insert(database, new_dataset())
    assert insert(database, new_dataset()) == first
    assert len(stored_rows(database)["datasets"]) == 1


def test_report_of_an_earlier_version_is_replaced_by_an_upload_of_the_same_bytes(database: Database) -> None:
    first = new_dataset()
    insert(database, replace(first, report=replace(first.report, finding_count=7)))
    assert insert(database, new_dataset()) == first


def test_same_bytes_in_another_format_are_another_dataset(database: Database) -> None:
    first = insert(database, new_dataset(shape="text"))
    assert insert(database, new_dataset(shape="alpaca")).id != first.id
    assert insert(database, new_dataset(sha256="1" * 64)).id != first.id
    assert len(stored_rows(database)["datasets"]) == 3


def test_unknown_dataset_is_not_found(database: Database) -> None:
    with database.read() as connection, pytest.raises(NotFound, match="ds_none"):
        get_dataset(connection, "ds_none")


def test_pages_go_from_the_newest_to_the_oldest(database: Database) -> None:
    ids = sorted((insert(database, new_dataset(sha256=str(n) * 64)).id for n in range(3)), reverse=True)
    with database.read() as connection:
        first = list_datasets(connection, PageRequest(2), project="local")
        rest = list_datasets(connection, PageRequest(2, before=first[-1].id), project="local")
    assert [dataset.id for dataset in (*first, *rest)] == ids


def test_newer_render_report_replaces_the_older(database: Database) -> None:
    dataset = insert(database, new_dataset())
    with database.write() as connection:
        assert get_render_report(connection, dataset.id, "k") is None
        put_render_report(connection, dataset.id, "k", {"rows": 1})
        put_render_report(connection, dataset.id, "other", {"rows": 7})
        put_render_report(connection, dataset.id, "k", {"rows": 2})
    with database.read() as connection:
        assert get_render_report(connection, dataset.id, "k") == {"rows": 2}
        assert get_render_report(connection, dataset.id, "other") == {"rows": 7}


def test_render_reports_are_deleted_with_their_dataset(database: Database) -> None:
    dataset = insert(database, new_dataset())
    with database.write() as connection:
        put_render_report(connection, dataset.id, "k", {"rows": 1})
        connection.execute(sa.delete(datasets))
    assert stored_rows(database)["render_reports"] == []


def test_needed_bytes_and_time_of_the_first_dataset(database: Database) -> None:
    with database.read() as connection:
        assert (first_stored_at(connection), all_needed_bytes(connection)) == (None, set())
    first = insert(database, new_dataset(sha256="a" * 64))
    insert(database, replace(new_dataset(sha256="b" * 64, project="other"), created_at=START + timedelta(days=1)))
    with database.write() as connection:
        mark_deleted(connection, first.id, START)
        assert first_stored_at(connection) == START
        assert all_needed_bytes(connection) == {"b" * 64}


def test_projects_do_not_share_datasets(database: Database) -> None:
    own, foreign = insert(database, new_dataset()), insert(database, new_dataset(project="other"))
    assert own.id != foreign.id
    with database.read() as connection:
        assert list_datasets(connection, PageRequest(9), project="local") == [own]
        with pytest.raises(NotFound):
            get_dataset(connection, foreign.id, project="local")


def test_datasets_are_listed_from_the_oldest_on_request(database: Database) -> None:
    ids = sorted(insert(database, new_dataset(sha256=f"{number:064}")).id for number in range(4))
    with database.read() as connection:
        page = list_datasets(connection, PageRequest(2, oldest_first=True, after=ids[0]), project="local")
        assert [dataset.id for dataset in page] == ids[1:3]


def test_deleted_dataset_is_not_found_until_its_bytes_are_stored_again(database: Database) -> None:
    dataset = insert(database, new_dataset())
    other = insert(database, new_dataset(project="other"))
    with database.write() as connection:
        put_render_report(connection, dataset.id, "k", {"rows": 3})
        mark_deleted(connection, dataset.id, START)
        assert list_datasets(connection, PageRequest(9), project="local") == []
        with pytest.raises(NotFound):
            get_dataset(connection, dataset.id, lock=True)
        assert get_render_report(connection, dataset.id, "k") is None
        lock_bytes(connection, dataset.sha256)
        assert are_bytes_needed(connection, dataset.sha256)
        mark_deleted(connection, other.id, START)
        assert not are_bytes_needed(connection, dataset.sha256)
    assert insert(database, new_dataset()) == dataset
    with database.read() as connection:
        assert get_dataset(connection, dataset.id) == dataset
