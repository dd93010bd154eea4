"""HTTP's conditional and range requests (RFC 9110, sections 13 and 14) for files that never change."""

from __future__ import annotations

import re

from api.errors import RangeNotSatisfiable

_SINGLE_RANGE = re.compile(r"bytes=(\d*)-(\d*)", re.IGNORECASE)


def etag_of(sha256: str) -> str:
    return f'"{sha256}"'


def is_unmodified(if_none_match: str | None, etag: str) -> bool:
    """Whether the client's copy, one of those it lists, is the file."""
    known = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
    return etag in known or "*" in known


def wanted_range(range_header: str | None, if_range: str | None, etag: str, size: int) -> tuple[int, int] | None:
    """The bytes [start, end) that are asked for; None for the whole file.

    Several ranges, other units and what cannot be parsed are answered with the whole file, as the RFC allows;
    so is a range of a file that has changed since (`if_range`).

    Raises:
        RangeNotSatisfiable: the file has none of the bytes.
    """
    match = _SINGLE_RANGE.fullmatch((range_header or "").strip())
    if match is None or (if_range is not None and if_range.strip() != etag):
        return None
    first, last = match.groups()
    if not first and not last:
        return None
    # More digits than any size has; Python would refuse to read thousands of them.
    if len(first) > 19:
        first = "9" * 19
    if len(last) > 19:
        last = "9" * 19
    if first and last and int(last) < int(first):
        return None
    start, end = (int(first), size) if first else (max(0, size - int(last)), size)
    if first and last:
        end = min(int(last) + 1, size)
    if start >= end:
        raise RangeNotSatisfiable(
            f"the file has {size} bytes; {match.group()} asks for none of them", location="range", size=size
        )
    return start, end
