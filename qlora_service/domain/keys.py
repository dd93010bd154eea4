"""API keys: what they look like, what they allow, and who asks under one."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

LOCAL_PROJECT = "local"
"""Owns what was stored before there were projects, and what is done without a key."""

PREFIX = "qk_"
"""Of every key, so that scanners of repositories and logs find one that was leaked."""
SECRET_BYTES = 32


class Scope(StrEnum):
    """What a key allows. Each includes the ones before it: who submits a job follows it, too."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


DEFAULT_SCOPES = frozenset({Scope.SUBMIT})


@dataclass(frozen=True)
class ApiKey:
    """What is stored of a key: everything but the key."""

    id: str
    project: str
    name: str
    scopes: frozenset[Scope]
    created_at: datetime
    revoked_at: datetime | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON: scopes from the least to the most."""
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
    """Whose objects a request sees, and what it may do with them. `key_id` is None where no keys are asked for."""

    project: str
    scopes: frozenset[Scope]
    key_id: str | None

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes


def new_secret() -> str:
    """A new key: 256 random bits, in letters that need no quoting in shells, headers and URLs."""
    return PREFIX + secrets.token_urlsafe(SECRET_BYTES)


def digest(secret: str) -> str:
    """The SHA-256 under which a key is stored and found.

    A slow hash protects passwords because people choose them from a small set. These are 256 random bits: nobody
    tries them out, however fast the hash is, and each request may be checked at once. And because the row is looked up
    by its hash, how long that takes tells nothing about the key: a guess with more right characters hashes to
    something else altogether.
    """
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()


def with_included(scopes: Iterable[Scope]) -> frozenset[Scope]:
    """The scopes, and those that they include."""
    ladder = list(Scope)
    return frozenset(lower for scope in scopes for lower in ladder[: ladder.index(scope) + 1])
