"""Checks of the path and the query string that apply to every route."""

from __future__ import annotations

from starlette.requests import Request

from qlora_service.errors import InvalidRequest, NotFound


async def refuse_nul(request: Request) -> None:
    """Rejects NUL characters: SQLite would store them, and PostgreSQL fails on them.

    Raises:
        NotFound: the path contains a NUL character, so it names no object.
        InvalidRequest: a query parameter contains a NUL character.
    """
    if "\0" in request.scope["path"]:
        raise NotFound(f"there is no {request.method} {request.scope['path']!r}: no path contains a NUL character")
    if b"%00" not in request.scope["query_string"]:
        return
    for name, value in request.query_params.multi_items():
        if "\0" in name or "\0" in value:
            shown = name.replace("\0", "\\0")
            raise InvalidRequest(f"{shown}: contains a NUL character", location=shown)
