"""Rows of webhook endpoints and deliveries. Functions take the caller's transaction."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from qlora_service.domain.ids import new_id
from qlora_service.domain.jobs import JobStatus
from qlora_service.domain.webhooks import EVENT_TYPES, Delivery, Endpoint
from qlora_service.errors import NotFound
from qlora_service.store.tables import jobs
from qlora_service.store.tables import webhook_deliveries as deliveries
from qlora_service.store.tables import webhook_endpoints as endpoints


def insert_endpoint(connection: Connection, endpoint: Endpoint) -> None:
    connection.execute(endpoints.insert().values(vars(endpoint)))


def get_endpoint(connection: Connection, endpoint_id: str, *, project: str) -> Endpoint:
    """Raises: NotFound, also for an endpoint of another project."""
    query = sa.select(endpoints).where(endpoints.c.id == endpoint_id, endpoints.c.project == project)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFound(
            f"there is no webhook endpoint {endpoint_id!r}; GET /v1/webhook_endpoints lists them",
            location="webhook_endpoint_id",
        )
    return Endpoint(**row._mapping)


def list_endpoints(connection: Connection, *, project: str, before: str | None, limit: int) -> list[Endpoint]:
    """Up to `limit` endpoints of a project with ids below `before`, newest first."""
    query = sa.select(endpoints).where(endpoints.c.project == project).order_by(endpoints.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(endpoints.c.id < before)
    return [Endpoint(**row._mapping) for row in connection.execute(query)]


def count_endpoints(connection: Connection, project: str) -> int:
    query = sa.select(sa.func.count()).where(endpoints.c.project == project)
    return connection.execute(query).scalar_one()


def update_endpoint(connection: Connection, endpoint_id: str, **values: Any) -> None:
    connection.execute(sa.update(endpoints).where(endpoints.c.id == endpoint_id).values(**values))


def disable_endpoint(connection: Connection, endpoint_id: str, now: datetime) -> None:
    """Disable the endpoint and drop its pending deliveries."""
    update_endpoint(connection, endpoint_id, disabled_at=now)
    pending = (deliveries.c.endpoint_id == endpoint_id, deliveries.c.due_at.is_not(None))
    connection.execute(sa.update(deliveries).where(*pending).values(due_at=None))


def delete_endpoint(connection: Connection, endpoint_id: str) -> None:
    """Delete the endpoint and its deliveries."""
    connection.execute(sa.delete(endpoints).where(endpoints.c.id == endpoint_id))


def new_delivery(endpoint_id: str, type_: str, job_id: str, now: datetime, *, event_id: str | None = None) -> Delivery:
    """A delivery of a job's end to an endpoint, due at once; not stored yet."""
    event_id = event_id or new_id("evt")
    body = {
        "id": event_id,
        "object": "event",
        "created_at": int(now.timestamp()),
        "type": type_,
        "data": {"id": job_id},
    }
    return Delivery(new_id("whd"), endpoint_id, event_id, type_, body, now, due_at=now)


def insert_delivery(connection: Connection, delivery: Delivery) -> None:
    connection.execute(deliveries.insert().values(vars(delivery)))


def insert_end_deliveries(connection: Connection, job_id: str, status: JobStatus, now: datetime) -> None:
    """Insert a delivery of the job's end for every endpoint that subscribes to it."""
    query = (
        sa.select(endpoints.c.id, endpoints.c.event_types)
        .join(jobs, jobs.c.project == endpoints.c.project)
        .where(jobs.c.id == job_id, endpoints.c.disabled_at.is_(None))
        # Locked: deleting an endpoint concurrently would fail this transaction, and with it the job's end.
        .with_for_update(read=True, key_share=True, of=endpoints)
    )
    type_, event_id = EVENT_TYPES[status], new_id("evt")
    for endpoint in connection.execute(query).all():
        if type_ in endpoint.event_types:
            insert_delivery(connection, new_delivery(endpoint.id, type_, job_id, now, event_id=event_id))


def list_deliveries(connection: Connection, endpoint_id: str, *, before: str | None, limit: int) -> list[Delivery]:
    """Up to `limit` deliveries to an endpoint with ids below `before`, newest first."""
    query = sa.select(deliveries).where(deliveries.c.endpoint_id == endpoint_id)
    query = query.order_by(deliveries.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(deliveries.c.id < before)
    return [Delivery(**row._mapping) for row in connection.execute(query)]


def any_due(connection: Connection, now: datetime) -> bool:
    query = sa.select(deliveries.c.id).where(deliveries.c.due_at <= now).limit(1)
    return connection.execute(query).first() is not None


def claim_due(connection: Connection, now: datetime, until: datetime, limit: int) -> list[tuple[Delivery, Endpoint]]:
    """Up to `limit` due deliveries, claimed for the caller until `until`, with their endpoints."""
    due = sa.select(deliveries.c.id).where(deliveries.c.due_at <= now).order_by(deliveries.c.due_at).limit(limit)
    ids: Sequence[str] = connection.execute(due.with_for_update(skip_locked=True)).scalars().all()
    claim = sa.update(deliveries).where(deliveries.c.id.in_(ids)).returning(deliveries)
    claimed = [
        Delivery(**row._mapping)
        for row in connection.execute(claim.values(due_at=until, attempts=deliveries.c.attempts + 1))
    ]
    wanted = sa.select(endpoints).where(endpoints.c.id.in_({delivery.endpoint_id for delivery in claimed}))
    found = {row.id: Endpoint(**row._mapping) for row in connection.execute(wanted)}
    return [(delivery, found[delivery.endpoint_id]) for delivery in claimed]


def record_attempt(connection: Connection, delivery: Delivery, **values: Any) -> None:
    """Store the outcome of the claimed attempt, unless a later attempt has begun."""
    same = (deliveries.c.id == delivery.id, deliveries.c.attempts == delivery.attempts)
    connection.execute(sa.update(deliveries).where(*same).values(**values))
