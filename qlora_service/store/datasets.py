"""Rows of datasets; their bytes are in the artifact store under their SHA-256."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from qlora_service.domain.datasets import Dataset, DatasetReport
from qlora_service.errors import NotFound
from qlora_service.store.pages import PageRequest
from qlora_service.store.tables import datasets, render_reports
from qlora_service.store.upsert import insert


def insert_dataset(connection: Connection, dataset: Dataset) -> Dataset:
    """The stored dataset: `dataset`, or an existing one with the same bytes, container and shape."""
    inserted = connection.execute(
        insert(connection, datasets)
        .values(
            id=dataset.id,
            project=dataset.project,
            sha256=dataset.sha256,
            filename=dataset.filename,
            bytes=dataset.report.bytes,
            container=dataset.report.container,
            shape=dataset.report.shape,
            report=dataset.report.as_dict(),
            created_at=dataset.created_at,
        )
        .on_conflict_do_nothing()
        .returning(datasets.c.id)
    ).one_or_none()
    if inserted is not None:
        return dataset
    same = (
        sa.update(datasets)
        .where(
            datasets.c.project == dataset.project,
            datasets.c.sha256 == dataset.sha256,
            datasets.c.container == dataset.report.container,
            datasets.c.shape == dataset.report.shape,
        )
        .values(deleted_at=None, report=dataset.report.as_dict())  # an earlier version may have stored the report
    )
    return _from_row(connection.execute(same.returning(datasets)).one())


def get_dataset(connection: Connection, dataset_id: str, *, project: str | None = None, lock: bool = False) -> Dataset:
    """The dataset; with `lock`, no other transaction deletes it before this one ends.

    Raises:
        NotFound: no such dataset, or not in `project`.
    """
    query = sa.select(datasets).where(datasets.c.id == dataset_id, datasets.c.deleted_at.is_(None))
    if project is not None:
        query = query.where(datasets.c.project == project)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise NotFound(f"there is no dataset {dataset_id!r}: POST the file to /datasets first", location="/dataset/id")
    return _from_row(row)


def list_datasets(connection: Connection, page: PageRequest, *, project: str) -> list[Dataset]:
    """A page of the project's datasets."""
    query = sa.select(datasets).where(datasets.c.project == project, datasets.c.deleted_at.is_(None))
    return [_from_row(row) for row in connection.execute(page.of(query, datasets.c.id))]


def mark_deleted(connection: Connection, dataset_id: str, now: datetime) -> None:
    """Hide the dataset; its row stays for the jobs that refer to it."""
    connection.execute(sa.update(datasets).where(datasets.c.id == dataset_id).values(deleted_at=now))
    connection.execute(sa.delete(render_reports).where(render_reports.c.dataset_id == dataset_id))


def lock_bytes(connection: Connection, sha256: str) -> None:
    """Lock the bytes with this SHA-256 against concurrent storing and deleting until the transaction ends."""
    if connection.dialect.name == "postgresql":  # SQLite has one writer at a time
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(f"dataset {sha256}"))))


def are_bytes_needed(connection: Connection, sha256: str) -> bool:
    """Whether a dataset of any project has these bytes."""
    query = sa.select(datasets.c.id).where(datasets.c.sha256 == sha256, datasets.c.deleted_at.is_(None)).limit(1)
    return connection.execute(query).one_or_none() is not None


def first_stored_at(connection: Connection) -> datetime | None:
    """Creation time of the oldest dataset, deleted ones included; None without any."""
    first: datetime | None = connection.execute(sa.select(sa.func.min(datasets.c.created_at))).scalar_one()
    return first


def all_needed_bytes(connection: Connection) -> set[str]:
    """SHA-256 of the bytes of every dataset."""
    return set(connection.execute(sa.select(datasets.c.sha256).where(datasets.c.deleted_at.is_(None))).scalars())


def get_render_report(connection: Connection, dataset_id: str, key: str) -> dict[str, Any] | None:
    query = sa.select(render_reports.c.report).where(
        render_reports.c.dataset_id == dataset_id, render_reports.c.key == key
    )
    return connection.execute(query).scalar_one_or_none()


def put_render_report(connection: Connection, dataset_id: str, key: str, report: dict[str, Any]) -> None:
    new = insert(connection, render_reports).values(dataset_id=dataset_id, key=key, report=report)
    connection.execute(
        new.on_conflict_do_update(index_elements=["dataset_id", "key"], set_={"report": new.excluded.report})
    )


def _from_row(row: Any) -> Dataset:
    return Dataset(
        id=row.id,
        project=row.project,
        sha256=row.sha256,
        filename=row.filename,
        created_at=row.created_at,
        report=DatasetReport.from_dict(row.report),
    )
