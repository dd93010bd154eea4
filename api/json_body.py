"""A request's JSON document, by the same strict reading as a dataset's rows."""

from __future__ import annotations

import json
from typing import Any

from api.errors import InvalidJSON
from qlora_service.data.strict_json import RowProblem, parse_json


def parse_body(body: bytes | bytearray) -> Any:
    """The value of a JSON document.

    Raises:
        InvalidJSON: not UTF-8, not JSON (with line and column), or JSON that programs read differently:
            NaN, a key used twice, half a surrogate pair, NUL, nesting without end.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidJSON(
            f"the body is not UTF-8: byte 0x{body[error.start]:02x} at offset {error.start}", offset=error.start
        ) from None
    try:
        return parse_json(text)
    except RowProblem as problem:
        raise _syntax_error(text) or InvalidJSON(
            f"the body cannot be used: {problem.reason}", location=problem.pointer or None
        ) from None


def _syntax_error(text: str) -> InvalidJSON | None:
    """Where the JSON breaks off; None when it is well-formed, but refused for another reason."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        return InvalidJSON(f"the body is not valid JSON: {error.msg} at {place}", line=error.lineno, column=error.colno)
    except (RecursionError, ValueError):
        return None
    return None
