"""Rows of uploads in parts. Functions take the caller's transaction."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from qlora_service.domain.uploads import Part, Upload, UploadStatus
from qlora_service.errors import NotFound
from qlora_service.store.tables import upload_parts, uploads


def insert_upload(connection: Connection, upload: Upload) -> None:
    connection.execute(uploads.insert().values(asdict(upload)))


def get_upload(connection: Connection, upload_id: str, *, project: str, lock: bool = False) -> Upload:
    """The upload; with `lock`, no other transaction changes it before this one ends.

    Raises:
        NotFound: no such upload, or not in `project`.
    """
    query = sa.select(uploads).where(uploads.c.id == upload_id, uploads.c.project == project)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise NotFound(f"there is no upload {upload_id!r}: POST /v1/uploads begins one", location="upload_id")
    return _from_row(row)


def close_upload(connection: Connection, upload_id: str, status: UploadStatus, dataset_id: str | None = None) -> None:
    """Set the upload's final status; it accepts no more parts."""
    values = {"status": status, "dataset_id": dataset_id}
    connection.execute(sa.update(uploads).where(uploads.c.id == upload_id).values(values))


def insert_part(connection: Connection, part: Part) -> None:
    connection.execute(upload_parts.insert().values(asdict(part)))


def list_parts(connection: Connection, upload_id: str) -> list[Part]:
    query = sa.select(upload_parts).where(upload_parts.c.upload_id == upload_id).order_by(upload_parts.c.id)
    return [Part(**row._mapping) for row in connection.execute(query)]


def delete_parts(connection: Connection, upload_id: str) -> None:
    connection.execute(sa.delete(upload_parts).where(upload_parts.c.upload_id == upload_id))


def expire_uploads(connection: Connection, now: datetime) -> list[str]:
    """Close expired uploads; the ids of closed uploads, of every project, that still have parts."""
    expired = (uploads.c.status == UploadStatus.PENDING, uploads.c.expires_at < now)
    connection.execute(sa.update(uploads).where(*expired).values(status=UploadStatus.EXPIRED))
    left = sa.select(upload_parts.c.upload_id).distinct().join(uploads)
    return list(connection.execute(left.where(uploads.c.status != UploadStatus.PENDING)).scalars())


def _from_row(row: Any) -> Upload:
    return Upload(**{**row._mapping, "status": UploadStatus(row.status)})
