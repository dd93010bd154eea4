"""JSON bodies of requests, parsed as strictly as the rows of a dataset."""

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
    """The value of a JSON document: the body, or the form part with the name `part`.

    Raises:
        InvalidJSON: not UTF-8, not JSON (with line and column), or JSON that parsers read differently:
            NaN, a duplicate key, half a surrogate pair, NUL, or nesting beyond the limit.
    """
    source = "the body" if part is None else f"the part {part!r}"
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidJSON(
            f"{source} is not UTF-8: byte 0x{body[error.start]:02x} at offset {error.start}",
            location=part,
            offset=error.start,
        ) from None
    try:
        return parse_json(text)
    except RowProblem as problem:
        raise _syntax_error(text, source, part) or InvalidJSON(
            f"{source} cannot be used: {problem.reason}", location=problem.pointer or part
        ) from None


def reason_of(fault: Mapping[str, Any], path: Sequence[str | int], model: type[BaseModel]) -> str:
    """The message of a pydantic validation error; for missing and unknown fields, a more helpful one.

    `fault` is one of the entries of `ValidationError.errors()`, `path` its location in `model`.
    """
    if fault["type"] == "missing":
        return "this field is required"
    if fault["type"] != "extra_forbidden":
        return str(fault["msg"])
    name, known = str(path[-1])[:SHOWN_CHARS], _known_fields(model, path[:-1])
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known fields: {', '.join(known)}"
    return f"unknown field {name!r}: {hint}"


def _known_fields(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """The field names of the model at `path` inside `model`."""
    for name in path:
        if name not in model.model_fields:
            continue  # an index into a list
        types: list[Any] = [model.model_fields[str(name)].annotation]
        while not (isinstance(types[0], type) and issubclass(types[0], BaseModel)):
            types = [*get_args(types[0]), *types[1:]]
        model = types[0]
    return sorted(model.model_fields)


def _syntax_error(text: str, source: str, part: str | None) -> InvalidJSON | None:
    """The error with line and column; None if the JSON is well-formed and was rejected for another reason."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        message = f"{source} is not valid JSON: {error.msg} at {place}"
        return InvalidJSON(message, location=part, line=error.lineno, column=error.colno)
    except (RecursionError, ValueError):
        return None
    return None
