"""API keys, their scopes, and the caller that a key authenticates."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

LOCAL_PROJECT = "local"
"""The default project: owner of data from before projects existed, and of requests without a key"""

PREFIX = "qk_"
"""Prefix of every key, by which secret scanners recognize a leaked one"""
SECRET_BYTES = 32


class Scope(StrEnum):
    """Permissions of a key. Each includes the ones before it: a client that submits a job also polls it."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


DEFAULT_SCOPES = frozenset({Scope.SUBMIT})


@dataclass(frozen=True)
class ApiKey:
    """A key as stored, without its secret."""

    id: str
    project: str
    name: str
    scopes: frozenset[Scope]
    created_at: datetime
    revoked_at: datetime | None = None

    def as_dict(self) -> dict[str, Any]:
        """The key as JSON, scopes in ascending order."""
        return {
            "id": self.id,
            "project": self.project,
            "name": self.name,
            "scopes": [scope.value for scope in Scope if scope in self.scopes],
            "created_at": self.created_at.isoformat(),
            "revoked_at": None if self.revoked_at is None else self.revoked_at.isoformat(),
        }


@dataclass(frozen=True)
class Caller:
    """Project and scopes of a request. `key_id` is None when the service requires no keys."""

    project: str
    scopes: frozenset[Scope]
    key_id: str | None

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes


def new_secret() -> str:
    """A new secret: 256 random bits in characters that need no quoting in shells, headers and URLs."""
    return PREFIX + secrets.token_urlsafe(SECRET_BYTES)


def digest(secret: str) -> str:
    """The SHA-256 under which a key is stored and looked up.

    A slow hash protects guessable passwords; 256 random bits cannot be guessed, and every request is checked. A lookup
    by hash leaks nothing through its timing: a guess with a longer correct prefix has an unrelated hash.
    """
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()


def with_included(scopes: Iterable[Scope]) -> frozenset[Scope]:
    """The scopes and all scopes that they include."""
    ascending = list(Scope)
    return frozenset(lower for scope in scopes for lower in ascending[: ascending.index(scope) + 1])
