"""Rows of API keys, by the hash of their secret."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from qlora_service.domain.keys import ApiKey, Scope
from qlora_service.errors import NotFound
from qlora_service.store.tables import api_keys
from qlora_service.store.upsert import insert


def insert_key(connection: Connection, key: ApiKey, sha256: str) -> bool:
    """Insert the key; False if a key with its id exists."""
    row = {
        "id": key.id,
        "project": key.project,
        "name": key.name,
        "sha256": sha256,
        "scopes": sorted(key.scopes),
        "created_at": key.created_at,
    }
    new = insert(connection, api_keys).values(row).on_conflict_do_nothing(index_elements=["id"])
    return connection.execute(new.returning(api_keys.c.id)).one_or_none() is not None


def find_key(connection: Connection, sha256: str) -> ApiKey | None:
    """The key with this hash, revoked or not."""
    row = connection.execute(sa.select(api_keys).where(api_keys.c.sha256 == sha256)).one_or_none()
    return None if row is None else _from_row(row)


def get_key(connection: Connection, key_id: str, *, project: str | None) -> ApiKey:
    """Raises: NotFound, also for a key of another project than `project`."""
    query = sa.select(api_keys).where(api_keys.c.id == key_id)
    if project is not None:
        query = query.where(api_keys.c.project == project)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFound(f"there is no key {key_id!r}: GET /keys, or `qlora keys list`, names them", location="key_id")
    return _from_row(row)


def list_keys(connection: Connection, *, project: str | None) -> list[ApiKey]:
    """Keys of a project, or of all projects, newest first, revoked ones included."""
    query = sa.select(api_keys).order_by(api_keys.c.id.desc())
    if project is not None:
        query = query.where(api_keys.c.project == project)
    return [_from_row(row) for row in connection.execute(query)]


def any_key(connection: Connection) -> bool:
    """Whether a key exists, revoked ones included."""
    return connection.execute(sa.select(api_keys.c.id).limit(1)).one_or_none() is not None


def mark_revoked(connection: Connection, key_id: str, now: datetime) -> None:
    """Set the time of revocation, unless the key is revoked already."""
    valid = (api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
    connection.execute(sa.update(api_keys).where(*valid).values(revoked_at=now))


def _from_row(row: Any) -> ApiKey:
    return ApiKey(
        id=row.id,
        project=row.project,
        name=row.name,
        scopes=frozenset(Scope(scope) for scope in row.scopes),
        created_at=row.created_at,
        revoked_at=row.revoked_at,
    )
