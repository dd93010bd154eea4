"""Who may ask: an API without a password has to know a web page of somebody else's from its own users.

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
    """Middleware that answers 403 to hosts that are neither this machine's loopback nor in `allowed`, and to web pages
    of other origins that want more than to read. `*` in `allowed` lets everybody in.
    """

    def __init__(self, app: ASGIApp, allowed: Set[str]) -> None:
        self._app = app
        self._allowed = allowed

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
        if _name(host) not in LOOPBACK | self._allowed:
            return Forbidden(
                f"the service is not known as {host[:SHOWN_CHARS]!r}: add the name, without port, to "
                "QLORA_ALLOWED_HOSTS where the service runs, and start it again",
                location="host",
            )
        if method in SAFE_METHODS:
            return None
        authority = (origin or "").partition("://")[2]
        if origin is None:
            foreign = headers.get("sec-fetch-site") == "cross-site"
        else:
            foreign = authority != host and _name(authority) not in self._allowed
        if not foreign:
            return None
        page = "of another site" if origin is None else f"at {origin[:SHOWN_CHARS]!r}"
        return Forbidden(
            f"a web page {page} asks for {method}, and this is {host[:SHOWN_CHARS]!r}: if the page is yours, add its host "
            "name to QLORA_ALLOWED_HOSTS where the service runs, and start it again; a proxy in front has to pass the "
            "Host header on",
            location="sec-fetch-site" if origin is None else "origin",
        )


def _name(authority: str) -> str | None:
    """The name or address in `host[:port]`, lower-case; None when it is no such thing."""
    match = _AUTHORITY.fullmatch(authority.lower())
    return match and (match[1] or match[2])
