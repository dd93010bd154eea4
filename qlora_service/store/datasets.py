"""Datasets as rows; their bytes lie in the artifact store under their SHA-256."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from qlora_service.data.checks import DatasetReport
from qlora_service.errors import NotFound
from qlora_service.store.conflicts import insert
from qlora_service.store.tables import datasets, render_reports


@dataclass(frozen=True)
class Dataset:
    """An upload that was checked and stored. The same bytes read the same way are one dataset of a project."""

    id: str
    project: str
    sha256: str
    filename: str | None
    created_at: datetime
    report: DatasetReport


def insert_dataset(connection: Connection, dataset: Dataset) -> Dataset:
    """The stored dataset: `dataset` itself, or the one that was there with the same bytes and reading."""
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
        .values(deleted_at=None)
    )
    return _from_row(connection.execute(same.returning(datasets)).one())


def get_dataset(connection: Connection, dataset_id: str, *, project: str | None = None) -> Dataset:
    """Raises: NotFound: there is none, or it belongs to another project than `project`."""
    query = sa.select(datasets).where(datasets.c.id == dataset_id, datasets.c.deleted_at.is_(None))
    if project is not None:
        query = query.where(datasets.c.project == project)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFound(f"there is no dataset {dataset_id!r}: POST the file to /datasets first", location="/dataset/id")
    return _from_row(row)


def list_datasets(connection: Connection, *, project: str, before: str | None, limit: int) -> list[Dataset]:
    """Up to `limit` datasets of a project, newest first, older than the id `before`."""
    mine = (datasets.c.project == project, datasets.c.deleted_at.is_(None))
    query = sa.select(datasets).where(*mine).order_by(datasets.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(datasets.c.id < before)
    return [_from_row(row) for row in connection.execute(query)]


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
