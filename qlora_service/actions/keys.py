"""API keys: create, list, revoke, authenticate."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import datetime

from sqlalchemy.engine import Connection

from qlora_service.domain.clock import utc_now
from qlora_service.domain.ids import new_id
from qlora_service.domain.keys import (
    DEFAULT_SCOPES,
    LOCAL_PROJECT,
    PREFIX,
    ApiKey,
    Caller,
    Scope,
    digest,
    new_secret,
    with_included,
)
from qlora_service.errors import Conflict, InvalidRequest, Unauthenticated
from qlora_service.store import keys as key_rows
from qlora_service.store.database import Database
from qlora_service.store.idempotency import Once, write_once

FIRST_KEY_ID = "key_" + 22 * "0"
"""A constant id: of two processes that start at once on an empty database, one inserts the key"""
MAX_NAME_CHARS = 64

_PROJECT = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")


class KeyRegistry:
    """The keys of all projects; safe to share between threads.

    Methods with a `project` see the keys of that project; without, those of all.
    """

    def __init__(self, database: Database, clock: Callable[[], datetime] = utc_now) -> None:
        self._database = database
        self._clock = clock

    def close(self) -> None:
        """Close the database's connections."""
        self._database.close()

    def create_key(
        self,
        project: str,
        name: str,
        scopes: Iterable[Scope] = DEFAULT_SCOPES,
        *,
        once: Once[ApiKey] | None = None,
    ) -> tuple[ApiKey, str]:
        """A new key and its secret, which is not stored.

        Raises:
            InvalidRequest: the project, the name or the scopes are invalid.
        """
        key = self._new_key(new_id("key"), project, name, scopes)
        secret = new_secret()

        def insert(connection: Connection) -> ApiKey:
            key_rows.insert_key(connection, key, digest(secret))
            return key

        return write_once(self._database, once, self._clock(), insert), secret

    def create_first_key(self) -> tuple[ApiKey, str] | None:
        """An admin key of the default project and its secret, if no key has ever existed; else None."""
        with self._database.read() as connection:
            if key_rows.any_key(connection):
                return None
        key = self._new_key(FIRST_KEY_ID, LOCAL_PROJECT, "first start", [Scope.ADMIN])
        secret = new_secret()
        with self._database.write() as connection:
            return (key, secret) if key_rows.insert_key(connection, key, digest(secret)) else None

    def list_keys(self, project: str | None = None) -> list[ApiKey]:
        """Newest first, revoked ones included."""
        with self._database.read() as connection:
            return key_rows.list_keys(connection, project=project)

    def revoke_key(self, key_id: str, project: str | None = None, *, keep_admin: bool = False) -> ApiKey:
        """The revoked key. Revoking it again changes nothing.

        Raises:
            NotFound: no such key.
            Conflict: with `keep_admin`, its project would have no admin key left.
        """
        with self._database.write() as connection:
            key = key_rows.get_key(connection, key_id, project=project)
            if keep_admin and _is_last_admin(key, key_rows.list_keys(connection, project=key.project)):
                raise Conflict(
                    f"{key_id} is the last admin key of project {key.project}: create another one first, or revoke it "
                    "with `qlora keys revoke` where the service runs",
                    location="key_id",
                )
            key_rows.mark_revoked(connection, key_id, self._clock())
            return key_rows.get_key(connection, key_id, project=project)

    def authenticate(self, secret: str) -> Caller:
        """The caller that the secret authenticates. Raises: Unauthenticated."""
        key = None
        if secret.startswith(PREFIX):
            with self._database.read() as connection:
                key = key_rows.find_key(connection, digest(secret))
        if key is None or key.revoked_at is not None:
            raise Unauthenticated(
                f"the key is {'not known' if key is None else 'revoked'}: `qlora keys create`, where the service "
                "runs, makes a new one"
            )
        return Caller(key.project, with_included(key.scopes), key.id)

    def _new_key(self, key_id: str, project: str, name: str, scopes: Iterable[Scope]) -> ApiKey:
        """Raises: InvalidRequest."""
        if not _PROJECT.fullmatch(project):
            raise InvalidRequest(
                f"{project!r} is not a valid project name: use 1 to 40 lower-case letters, digits, '_' and '-'",
                location="project",
            )
        if not name.strip() or len(name) > MAX_NAME_CHARS or not name.isprintable():
            raise InvalidRequest(f"a key's name has 1 to {MAX_NAME_CHARS} printable characters", location="name")
        chosen = frozenset(scopes)
        if not chosen:
            raise InvalidRequest(f"a key needs at least one scope: give {', '.join(Scope)}", location="scopes")
        return ApiKey(key_id, project, name, chosen, self._clock())


def _is_last_admin(key: ApiKey, keys: Iterable[ApiKey]) -> bool:
    """Whether `key` is the only unrevoked admin key among a project's `keys`."""
    admins = [other.id for other in keys if Scope.ADMIN in other.scopes and other.revoked_at is None]
    return admins == [key.id]


def open_key_registry(database_url: str) -> KeyRegistry:
    """The keys in the database; its schema is migrated to the newest."""
    database = Database(database_url)
    database.migrate()
    return KeyRegistry(database)
