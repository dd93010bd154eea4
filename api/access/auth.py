"""Which key a request came under, and whether that key may do what the request asks.

Every route that `api.main` does not list as open demands a key in the header `Authorization: Bearer`, where OpenAI's
clients send theirs too. Nowhere else: addresses end up in logs and histories.
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
from api.access.request_rate import RequestRate
from api.errors import Forbidden
from qlora_service.actions.keys import Access
from qlora_service.domain.keys import LOCAL_PROJECT, Caller, Scope, digest
from qlora_service.errors import Unauthenticated

REMEMBERED_S = 1.0
"""How long a key that was let in is not looked up again: a revoked one is refused a second later at the latest."""
ADMIN_TAG = "admin"
"""Of routes that only an admin key may use."""

EVENT_STREAM = "text/event-stream"
ANYBODY = Caller(LOCAL_PROJECT, frozenset(Scope), key_id=None)

_BEARER = HTTPBearer(
    scheme_name="key",
    auto_error=False,
    description="A key of the service: the first start prints one, `qlora keys create` makes more.",
)


class Gate:
    """Lets requests in. Without `access` everybody is let in, as the default project with every scope."""

    def __init__(
        self,
        access: Access | None,
        max_requests_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._access = access
        self._rate = None if max_requests_per_minute is None else RequestRate(max_requests_per_minute, clock)
        self._clock = clock
        # By hash, with the time until which they are believed. Only keys that exist get in, so it stays small.
        self._known: dict[str, tuple[Caller, float]] = {}

    async def admit(self, secret: str | None, needed: Scope) -> Caller:
        """Who asks.

        Raises:
            Unauthenticated: without a key, or with one that is unknown or revoked.
            RateLimited: the key has asked too often.
            Forbidden: the key lacks the scope.
        """
        caller = await self.caller(secret)
        if self._rate is not None:
            self._rate.take(caller.key_id)
        if not caller.may(needed):
            raise Forbidden(
                f"this needs a key of the scope '{needed}', and {caller.key_id} has only "
                f"{', '.join(scope for scope in Scope if caller.may(scope))}: ask an admin of project "
                f"{caller.project} for another key",
                location="authorization",
                scope=needed,
            )
        return caller

    async def caller(self, secret: str | None) -> Caller:
        """Whose key this is, whatever it allows. Raises: Unauthenticated."""
        if self._access is None:
            return ANYBODY
        if not secret:
            raise Unauthenticated(
                "this needs a key: send the header 'Authorization: Bearer qk_…'. `qlora keys create`, where the "
                "service runs, makes one; qlora and the SDK send what QLORA_API_KEY says",
                location="authorization",
            )
        sha256, now = digest(secret), self._clock()
        caller, until = self._known.get(sha256, (None, now))
        if caller is None or until <= now:
            self._known.pop(sha256, None)
            caller = await run_in_threadpool(self._access.authenticate, secret)
            self._known[sha256] = caller, now + REMEMBERED_S
        return caller


async def authenticate(request: Request) -> Caller:
    """Who sent the request, for what reads it before its route does. Raises: as `Gate.admit`."""
    known: Caller | None = getattr(request.state, "caller", None)
    if known is None:
        gate: Gate = request.app.state.gate
        known = request.state.caller = await gate.admit(await _secret(request), needed_scope(request))
    return known


async def authenticated(
    request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
) -> Caller:
    """Who sent the request; as a dependency, so that the documentation says what is demanded."""
    return await authenticate(request)


CallerOf = Annotated[Caller, Depends(authenticated)]


async def _secret(request: Request) -> str | None:
    """The key that the request was sent with."""
    credentials = await _BEARER(request)
    return None if credentials is None else credentials.credentials


def needed_scope(request: Request) -> Scope:
    """What a key has to allow for this request."""
    if ADMIN_TAG in getattr(request.scope["route"], "tags", ()):
        return Scope.ADMIN
    return Scope.READ if request.method in SAFE_METHODS else Scope.SUBMIT


class StreamGuard:
    """Middleware that ends event streams whose key was revoked: they would go on for as long as the client likes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        secret: str | None = None
        streams = ended = False

        async def send_to_known(message: Message) -> None:
            nonlocal secret, streams, ended
            if message["type"] == "http.response.start":
                streams = Headers(raw=message["headers"]).get("content-type", "").startswith(EVENT_STREAM)
                secret = await _secret(Request(scope)) if streams else None
            elif streams:
                try:
                    await scope["app"].state.gate.caller(secret)
                except Unauthenticated:
                    ended = True
                    await send({"type": "http.response.body", "body": b""})
                    # As a server says that nobody listens any more: so the response stops what makes the events.
                    raise OSError("the key was revoked") from None
            await send(message)

        try:
            await self._app(scope, receive, send_to_known)
        except Exception:
            if not ended:  # otherwise it is our own OSError, in whatever it was wrapped on its way
                raise


def hand_over_first_key(access: Access) -> None:
    """Prints a new admin key when there never was a key. Not by way of the log: that is kept, and sent elsewhere."""
    made = access.create_first_key()
    if made is not None:
        key, secret = made
        print(
            f"This is the first start. The admin key of project '{key.project}', shown this once:\n\n"
            f"    export QLORA_API_KEY={secret}\n\n"
            "qlora and the SDK then send it; other programs: 'Authorization: Bearer $QLORA_API_KEY'. "
            "`qlora keys` makes more, and revokes them.",
            file=sys.stderr,
            flush=True,
        )
