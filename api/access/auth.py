"""Authentication and authorization: the key of a request, and whether its scopes allow the request.

Every route that `api.main` does not list as open requires a key in the header `Authorization: Bearer`, the header that
OpenAI's clients send too. A key in the URL is not accepted, because URLs end up in logs and browser histories.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Annotated

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as Connection

from api.access.origins import SAFE_METHODS
from api.access.request_rate import RateLimiter
from api.errors import Forbidden
from qlora_service.actions.keys import KeyRegistry
from qlora_service.domain.keys import LOCAL_PROJECT, Caller, Scope, digest
from qlora_service.errors import Unauthenticated

CACHED_S = 1.0
"""Seconds that a valid key is cached: a revoked key is rejected at most this much later."""
ADMIN_TAG = "admin"
"""Tag of the routes that need a key with the scope `admin`."""

EVENT_STREAM = "text/event-stream"
ANONYMOUS = Caller(LOCAL_PROJECT, frozenset(Scope), key_id=None)
"""Caller of every request when keys are off."""

_BEARER = HTTPBearer(
    scheme_name="key",
    auto_error=False,
    description="A key of the service: the first start prints one, `qlora keys create` creates more.",
)


class Authenticator:
    """Checks keys, request rates and scopes.

    Without a registry, keys are off: every caller is ANONYMOUS, the default project with every scope.
    """

    def __init__(
        self,
        registry: KeyRegistry | None,
        max_requests_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._limiter = None if max_requests_per_minute is None else RateLimiter(max_requests_per_minute, clock)
        self._clock = clock
        # By hash of the key: caller, and the time when the entry expires. Small, because only existing keys are cached.
        self._cache: dict[str, tuple[Caller, float]] = {}

    async def authorize(self, secret: str | None, required: Scope) -> Caller:
        """The caller, if its key has the required scope.

        Raises:
            Unauthenticated: no key, or a key that is unknown or revoked.
            RateLimited: the key has sent too many requests.
            Forbidden: the key lacks the scope.
        """
        caller = await self.authenticate(secret)
        if self._limiter is not None:
            self._limiter.take(caller.key_id)
        if not caller.may(required):
            raise Forbidden(
                f"this needs a key with the scope '{required}', but {caller.key_id} has only "
                f"{', '.join(scope for scope in Scope if caller.may(scope))}: ask an admin of project "
                f"{caller.project} for another key",
                location="authorization",
                scope=required,
            )
        return caller

    async def authenticate(self, secret: str | None) -> Caller:
        """The caller that the key belongs to, whatever its scopes. Raises: Unauthenticated."""
        if self._registry is None:
            return ANONYMOUS
        if not secret:
            raise Unauthenticated(
                "this needs a key: send the header 'Authorization: Bearer qk_…'. `qlora keys create`, where the "
                "service runs, makes one; qlora and the SDK send the key in QLORA_API_KEY",
                location="authorization",
            )
        sha256, now = digest(secret), self._clock()
        caller, expires_at = self._cache.get(sha256, (None, now))
        if caller is None or expires_at <= now:
            self._cache.pop(sha256, None)
            caller = await run_in_threadpool(self._registry.authenticate, secret)
            self._cache[sha256] = caller, now + CACHED_S
        return caller


async def authenticate(request: Request) -> Caller:
    """The caller of the request, once per request; for code that runs before the route. Raises: as `authorize`."""
    caller: Caller | None = getattr(request.state, "caller", None)
    if caller is None:
        authenticator: Authenticator = request.app.state.authenticator
        caller = request.state.caller = await authenticator.authorize(await _secret(request), required_scope(request))
    return caller


async def authenticated(
    request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
) -> Caller:
    """The caller of the request, as a dependency that documents the required key in OpenAPI."""
    return await authenticate(request)


CallerOf = Annotated[Caller, Depends(authenticated)]


def required_scope(request: Request) -> Scope:
    """The scope that a key needs for this request."""
    if ADMIN_TAG in getattr(request.scope["route"], "tags", ()):
        return Scope.ADMIN
    return Scope.READ if request.method in SAFE_METHODS else Scope.SUBMIT


class StreamGuard:
    """Middleware that ends event streams when their key is revoked; a client could keep them open without limit."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        secret: str | None = None
        is_stream = revoked = False

        async def send_while_valid(message: Message) -> None:
            nonlocal secret, is_stream, revoked
            if message["type"] == "http.response.start":
                is_stream = Headers(raw=message["headers"]).get("content-type", "").startswith(EVENT_STREAM)
                secret = await _secret(Request(scope)) if is_stream else None
            elif is_stream:
                try:
                    await scope["app"].state.authenticator.authenticate(secret)
                except Unauthenticated:
                    revoked = True
                    await send({"type": "http.response.body", "body": b""})
                    # The exception of a server whose client has disconnected: the response then stops the generator
                    # of the events.
                    raise OSError("the key was revoked") from None
            await send(message)

        try:
            await self._app(scope, receive, send_while_valid)
        except Exception:
            if not revoked:  # otherwise it is the OSError above, possibly wrapped by other middleware
                raise


def print_first_key(registry: KeyRegistry) -> None:
    """Prints a new admin key if no key was ever created. Not in the log, because logs are kept and forwarded."""
    created = registry.create_first_key()
    if created is not None:
        key, secret = created
        print(
            f"This is the first start. The admin key of project '{key.project}', shown only once:\n\n"
            f"    export QLORA_API_KEY={secret}\n\n"
            "qlora and the SDK then send it; other programs: 'Authorization: Bearer $QLORA_API_KEY'. "
            "`qlora keys` creates more keys, and revokes them.",
            file=sys.stderr,
            flush=True,
        )


async def _secret(request: Request) -> str | None:
    """The key that the request was sent with."""
    credentials = await _BEARER(request)
    return None if credentials is None else credentials.credentials
