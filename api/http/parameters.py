"""What no path and no query string may hold, whatever its route makes of it."""

from __future__ import annotations

from starlette.requests import Request

from qlora_service.errors import InvalidRequest, NotFound


async def refuse_nul(request: Request) -> None:
    """Returns when there is no NUL character: SQLite would store one, PostgreSQL fails over it.

    Raises:
        NotFound: the path has one, and so is nothing's.
        InvalidRequest: a query parameter has one.
    """
    if "\0" in request.scope["path"]:
        raise NotFound(f"there is no {request.method} {request.scope['path']!r}: no path holds a NUL character")
    if b"%00" not in request.scope["query_string"]:
        return
    for name, value in request.query_params.multi_items():
        if "\0" in name or "\0" in value:
            shown = name.replace("\0", "\\0")
            raise InvalidRequest(f"{shown}: contains a NUL character", location=shown)
