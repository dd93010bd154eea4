"""Which host names and web pages may ask: somebody else's page is to be known from the service's own users.

A page in a user's browser can send requests to the user's loopback (cross-site request forgery), and with a host
name of its own that resolves to it also read the answers (DNS rebinding). Browsers tell both: by `Host`, `Origin` and
`Sec-Fetch-Site`, which no page can forge. Programs send no `Origin`.
"""

from __future__ import annotations

import re
from collections.abc import Set

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import Forbidden, refusal

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
# Load balancers and container engines ask under any name.
OPEN_PATHS = frozenset({"/healthz", "/readyz"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
SHOWN_CHARS = 100

_AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:/@\[\]]+?))\.?(?::\d*)?")


class OriginGuard:
    """Middleware that answers 403 to requests under unknown host names and to other sites' pages that want to write.

    Known are the loopback, the host the API was told to listen on, and what the operator `allowed`; with `*` there,
    everybody is let in. A page served from an allowed host may write, whatever its port.
    """

    def __init__(self, app: ASGIApp, *, listening: str, allowed: Set[str]) -> None:
        self._app = app
        self._allowed = allowed
        self._hosts = LOOPBACK | {listening.lower()} | allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and "*" not in self._allowed:
            error = self._fault(scope["method"], Headers(scope=scope))
            if error is not None:
                scope.setdefault("state", {})["error_code"] = error.code
                await refusal(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _fault(self, method: str, headers: Headers) -> Forbidden | None:
        """Why the request is refused; None when it is not."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if _name(host) not in self._hosts:
            return Forbidden(
                f"the service is not known as {host[:SHOWN_CHARS]!r}: add the name, without port, to "
                "QLORA_ALLOWED_HOSTS where the service runs, and start it again",
                location="host",
            )
        if method in SAFE_METHODS:
            return None
        if origin is None:
            if headers.get("sec-fetch-site") != "cross-site":
                return None
            return _stranger("of another site", host, "sec-fetch-site")
        # Of an origin, "null" has no authority; its scheme is the proxy's where there is one.
        authority = origin.partition("://")[2]
        if authority.lower() == host.lower() or _name(authority) in self._allowed:
            return None
        return _stranger(f"at {origin[:SHOWN_CHARS]!r}", host, "origin")


def _stranger(page: str, host: str, location: str) -> Forbidden:
    return Forbidden(
        f"a web page {page} may not change anything here, at {host[:SHOWN_CHARS]!r}: if it is yours, add its host "
        "name to QLORA_ALLOWED_HOSTS where the service runs, and start it again; a proxy has to pass Host on",
        location=location,
    )


def _name(authority: str) -> str | None:
    """The name or address in `host[:port]`, lower-case; None when it is no such thing."""
    match = _AUTHORITY.fullmatch(authority.lower())
    return match and (match[1] or match[2])
