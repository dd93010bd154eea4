"""Checks of host names and web pages: requests from pages of other sites are rejected.

A page in a user's browser can send requests to the loopback interface of the user's machine (cross-site request
forgery). With a host name of its own that resolves to the loopback, it can also read the responses (DNS rebinding).
Browsers reveal both in `Host`, `Origin` and `Sec-Fetch-Site`, which no page can forge. Programs send no `Origin`.
"""

from __future__ import annotations

import re
from collections.abc import Set

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import Forbidden, response_of

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
# Load balancers and container engines send any host name.
OPEN_PATHS = frozenset({"/healthz", "/readyz"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
SHOWN_CHARS = 100

_AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:/@\[\]]+?))\.?(?::\d*)?")


class OriginGuard:
    """Middleware that answers 403 to unknown host names, and to writes from web pages of other sites.

    Known host names are the loopback, the host that the API listens on (`listening`), and the names that the operator
    `allowed`; with `*` among these, every request passes. A page served from an allowed host may write, on any port.
    """

    def __init__(self, app: ASGIApp, *, listening: str, allowed: Set[str]) -> None:
        self._app = app
        self._allowed = allowed
        self._hosts = LOOPBACK | {listening.lower()} | allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and "*" not in self._allowed:
            error = self._violation(scope["method"], Headers(scope=scope))
            if error is not None:
                scope.setdefault("state", {})["error_code"] = error.code
                await response_of(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _violation(self, method: str, headers: Headers) -> Forbidden | None:
        """The reason to reject the request; None if it is allowed."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if _host_name(host) not in self._hosts:
            return Forbidden(
                f"the service is not known as {host[:SHOWN_CHARS]!r}: add the name, without port, to "
                "QLORA_ALLOWED_HOSTS where the service runs, and restart the service",
                location="host",
            )
        if method in SAFE_METHODS:
            return None
        if origin is None:
            if headers.get("sec-fetch-site") != "cross-site":
                return None
            return _foreign_page("of another site", host, "sec-fetch-site")
        # The scheme does not count: behind a proxy, it is the proxy's. The origin "null" has no authority.
        authority = origin.partition("://")[2]
        if authority.lower() == host.lower() or _host_name(authority) in self._allowed:
            return None
        return _foreign_page(f"at {origin[:SHOWN_CHARS]!r}", host, "origin")


def _foreign_page(page: str, host: str, location: str) -> Forbidden:
    return Forbidden(
        f"a web page {page} may not change anything at {host[:SHOWN_CHARS]!r}: if the page is yours, add its host "
        "name to QLORA_ALLOWED_HOSTS where the service runs, and restart the service; a proxy must forward the Host "
        "header",
        location=location,
    )


def _host_name(authority: str) -> str | None:
    """The name or address in `host[:port]`, in lower case; None if `authority` is malformed."""
    match = _AUTHORITY.fullmatch(authority.lower())
    return match and (match[1] or match[2])
