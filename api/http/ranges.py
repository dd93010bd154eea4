"""Conditional requests and range requests of HTTP (RFC 9110, sections 13 and 14), for files that never change."""

from __future__ import annotations

import re

from api.errors import RangeNotSatisfiable

_SINGLE_RANGE = re.compile(r"bytes=(\d*)-(\d*)", re.IGNORECASE)


def etag_of(sha256: str) -> str:
    return f'"{sha256}"'


def is_unmodified(if_none_match: str | None, etag: str) -> bool:
    """Whether If-None-Match lists the file's ETag: the client has a current copy."""
    known = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
    return etag in known or "*" in known


def requested_range(range_header: str | None, if_range: str | None, etag: str, size: int) -> tuple[int, int] | None:
    """The requested bytes [start, end); None for the whole file.

    Several ranges, other units and malformed headers give the whole file, as the RFC allows; so does a range of
    another version of the file (`if_range`).

    Raises:
        RangeNotSatisfiable: the range lies beyond the end of the file.
    """
    match = _SINGLE_RANGE.fullmatch((range_header or "").strip())
    if match is None or (if_range is not None and if_range.strip() != etag):
        return None
    first, last = match.groups()
    if not first and not last:
        return None
    # 19 digits exceed every file size; Python refuses to convert thousands of digits.
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
            f"the file has {size} bytes; {match.group()} requests none of them", location="range", size=size
        )
    return start, end
