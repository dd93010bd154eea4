"""A request's JSON document, by the same strict reading as a dataset's rows."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from api.errors import InvalidJSON
from qlora_service.data.json.strict import RowProblem, parse_json

SHOWN_CHARS = 60


def parse_body(body: bytes | bytearray, part: str | None = None) -> Any:
    """The value of a JSON document: the body, or the part of a form that is called so.

    Raises:
        InvalidJSON: not UTF-8, not JSON (with line and column), or JSON that programs read differently:
            NaN, a key used twice, half a surrogate pair, NUL, nesting without end.
    """
    what = "the body" if part is None else f"the part {part!r}"
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidJSON(
            f"{what} is not UTF-8: byte 0x{body[error.start]:02x} at offset {error.start}",
            location=part,
            offset=error.start,
        ) from None
    try:
        return parse_json(text)
    except RowProblem as problem:
        raise _syntax_error(text, what, part) or InvalidJSON(
            f"{what} cannot be used: {problem.reason}", location=problem.pointer or part
        ) from None


def reason_of(fault: Mapping[str, Any], path: Sequence[str | int], model: type[BaseModel]) -> str:
    """What one of pydantic's faults says, in our own words where those say more; `path` is its place in a `model`."""
    if fault["type"] == "missing":
        return "this field is required"
    if fault["type"] != "extra_forbidden":
        return str(fault["msg"])
    name, known = str(path[-1])[:SHOWN_CHARS], _known_fields(model, path[:-1])
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown field {name!r}: " + (f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(known)}")


def _known_fields(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """The fields of the part at `path` in a `model`."""
    for name in path:
        if name not in model.model_fields:
            continue  # the place in a list
        kinds: list[Any] = [model.model_fields[str(name)].annotation]
        while not (isinstance(kinds[0], type) and issubclass(kinds[0], BaseModel)):
            kinds = [*get_args(kinds[0]), *kinds[1:]]
        model = kinds[0]
    return sorted(model.model_fields)


def _syntax_error(text: str, what: str, part: str | None) -> InvalidJSON | None:
    """Where the JSON breaks off; None when it is well-formed, but refused for another reason."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        message = f"{what} is not valid JSON: {error.msg} at {place}"
        return InvalidJSON(message, location=part, line=error.lineno, column=error.colno)
    except (RecursionError, ValueError):
        return None
    return None
