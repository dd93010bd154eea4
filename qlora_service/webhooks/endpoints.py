"""Actions of users on webhook endpoints, one method per action."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy.engine import Connection

from qlora_service.domain.clock import utc_now
from qlora_service.domain.ids import new_id
from qlora_service.domain.keys import LOCAL_PROJECT
from qlora_service.domain.webhooks import EVENT_TYPES, Delivery, Endpoint
from qlora_service.errors import InvalidRequest, ObjectLimitReached
from qlora_service.store import webhooks as rows
from qlora_service.store.database import Database
from qlora_service.store.idempotency import Once, recall, write_once
from qlora_service.webhooks.delivery import MAX_ERROR_CHARS, Deliverer, send_delivery
from qlora_service.webhooks.sending import Sender
from qlora_service.webhooks.signing import new_secret

MAX_ENDPOINTS = 20
"""Limit per project, because every job that ends writes one row per endpoint"""
MAX_NAME_CHARS = 64
OLD_SECRET_LIFETIME = timedelta(hours=24)
"""As `keep_old_secret_active_for_24_hours` of the API states"""
SAMPLE_JOB = "job_0000000000000000000000"
"""The job id in a test event"""


class Webhooks:
    """The endpoints of one project; safe to share between threads."""

    def __init__(
        self,
        database: Database,
        sender: Sender,
        *,
        clock: Callable[[], datetime] = utc_now,
        project: str = LOCAL_PROJECT,
    ) -> None:
        self._database = database
        self._sender = sender
        self._clock = clock
        self._project = project

    def within(self, project: str) -> Webhooks:
        """The endpoints of another project."""
        other = copy.copy(self)
        other._project = project
        return other

    def create(
        self, name: str, url: str, event_types: Sequence[str], *, once: Once[Endpoint] | None = None
    ) -> Endpoint:
        """A new endpoint, with its secret.

        Raises:
            InvalidRequest: the name, an event type or the URL is not allowed.
            ObjectLimitReached: the project has MAX_ENDPOINTS endpoints.
        """
        recall(self._database, once)
        _check_name(name)
        types = _validated_types(event_types)
        self._sender.check(url)
        endpoint = Endpoint(new_id("wh"), self._project, name, url, types, new_secret(), self._clock())

        def insert(connection: Connection) -> Endpoint:
            if rows.count_endpoints(connection, self._project) >= MAX_ENDPOINTS:
                raise ObjectLimitReached(
                    f"the project has {MAX_ENDPOINTS} webhook endpoints, which is the limit: delete or change one",
                    max_webhook_endpoints=MAX_ENDPOINTS,
                )
            rows.insert_endpoint(connection, endpoint)
            return endpoint

        return write_once(self._database, once, self._clock(), insert)

    def get(self, endpoint_id: str) -> Endpoint:
        """Raises: NotFound."""
        with self._database.read() as connection:
            return rows.get_endpoint(connection, endpoint_id, project=self._project)

    def list_endpoints(self, *, before: str | None = None, limit: int = 20) -> list[Endpoint]:
        """Up to `limit` endpoints older than the id `before`, newest first."""
        with self._database.read() as connection:
            return rows.list_endpoints(connection, project=self._project, before=before, limit=limit)

    def update(
        self,
        endpoint_id: str,
        *,
        name: str | None = None,
        url: str | None = None,
        event_types: Sequence[str] | None = None,
        once: Once[Endpoint] | None = None,
    ) -> Endpoint:
        """The endpoint after changing every argument that is not None. This enables a disabled endpoint again.

        Raises:
            NotFound: no such endpoint.
            InvalidRequest: as `create` does.
        """
        recall(self._database, once)
        self.get(endpoint_id)
        changes: dict[str, Any] = {"name": name, "url": url, "event_types": event_types}
        changes = {field: value for field, value in changes.items() if value is not None}
        if name is not None:
            _check_name(name)
        if event_types is not None:
            changes["event_types"] = _validated_types(event_types)
        if url is not None:
            self._sender.check(url)

        def change(connection: Connection) -> Endpoint:
            old = rows.get_endpoint(connection, endpoint_id, project=self._project)
            rows.update_endpoint(connection, endpoint_id, **changes, disabled_at=None)
            return replace(old, **changes, disabled_at=None)

        return write_once(self._database, once, self._clock(), change)

    def delete(self, endpoint_id: str) -> None:
        """Raises: NotFound."""
        with self._database.write() as connection:
            rows.get_endpoint(connection, endpoint_id, project=self._project)
            rows.delete_endpoint(connection, endpoint_id)

    def rotate_secret(
        self, endpoint_id: str, *, keep_old: bool = False, once: Once[Endpoint] | None = None
    ) -> Endpoint:
        """The endpoint with a new secret, which signs every message from now on.

        With `keep_old`, the previous secret also signs for OLD_SECRET_LIFETIME. Older secrets expire at once.

        Raises:
            NotFound: no such endpoint.
        """

        def change(connection: Connection) -> Endpoint:
            endpoint = rows.get_endpoint(connection, endpoint_id, project=self._project)
            changes: dict[str, Any] = {"secret": new_secret(), "old_secret": None, "old_secret_until": None}
            if keep_old:
                changes |= {"old_secret": endpoint.secret, "old_secret_until": self._clock() + OLD_SECRET_LIFETIME}
            rows.update_endpoint(connection, endpoint_id, **changes)
            return replace(endpoint, **changes)

        return write_once(self._database, once, self._clock(), change)

    def test(self, endpoint_id: str, event_type: str, *, once: Once[Delivery] | None = None) -> Delivery:
        """The delivery of a sample event, which is sent synchronously and never retried.

        Raises:
            NotFound: no such endpoint.
            InvalidRequest: the event type does not exist, or the endpoint did not respond.
        """
        recall(self._database, once)
        endpoint = self.get(endpoint_id)
        _validated_types([event_type])
        sample = rows.new_delivery(endpoint_id, event_type, SAMPLE_JOB, self._clock())
        delivery = replace(sample, due_at=None, attempts=1)
        try:
            status = send_delivery(self._sender, sample, endpoint, self._clock())
        except InvalidRequest as error:
            # Stored without the idempotency key, so that a retry of the request sends the event again.
            write_once(
                self._database,
                None,
                self._clock(),
                partial(self._insert, replace(delivery, last_error=error.message[:MAX_ERROR_CHARS])),
            )
            raise
        delivered_at = self._clock() if 200 <= status < 300 else None
        return write_once(
            self._database,
            once,
            self._clock(),
            partial(self._insert, replace(delivery, last_status=status, delivered_at=delivered_at)),
        )

    def deliveries(self, endpoint_id: str, *, before: str | None = None, limit: int = 20) -> list[Delivery]:
        """Up to `limit` deliveries to the endpoint older than the id `before`, newest first. Raises: NotFound."""
        with self._database.read() as connection:
            rows.get_endpoint(connection, endpoint_id, project=self._project)
            return rows.list_deliveries(connection, endpoint_id, before=before, limit=limit)

    def _insert(self, delivery: Delivery, connection: Connection) -> Delivery:
        """Stores the delivery. Raises: NotFound, if the endpoint was deleted in the meantime."""
        rows.get_endpoint(connection, delivery.endpoint_id, project=self._project)
        rows.insert_delivery(connection, delivery)
        return delivery


@contextmanager
def open_webhooks(database_url: str, *, private: bool) -> Iterator[Webhooks]:
    """The webhook endpoints in this database. A thread sends due deliveries while the context is open.

    `private` allows http and addresses outside the public internet.
    """
    database, sender = Database(database_url), Sender(private=private)
    deliverer = Deliverer(database, sender)
    deliverer.start()
    try:
        yield Webhooks(database, sender)
    finally:
        deliverer.stop()
        database.close()


def _check_name(name: str) -> None:
    """Raises: InvalidRequest."""
    if not name.strip() or len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise InvalidRequest(f"an endpoint name has 1 to {MAX_NAME_CHARS} printable characters", location="/name")


def _validated_types(event_types: Sequence[str]) -> list[str]:
    """The event types, without duplicates. Raises: InvalidRequest, if one is unknown or there are none."""
    known = list(EVENT_TYPES.values())
    unknown = [type_ for type_ in event_types if type_ not in known]
    if unknown or not event_types:
        problem = f"unknown event type {unknown[0]!r}" if unknown else "an endpoint needs at least one event type"
        raise InvalidRequest(f"{problem}: use one or more of {', '.join(known)}", location="/event_types")
    return list(dict.fromkeys(event_types))
