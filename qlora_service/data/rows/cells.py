"""Cells of a row: checks of their types, and JSON texts in them read as what they hold."""

from __future__ import annotations

from typing import Any, NamedTuple

from qlora_service.data.json.strict import RowProblem, parse_json


class Note(NamedTuple):
    """A part of a usable row that is not trained, or not as one would expect, at a JSON pointer of the row."""

    pointer: str
    reason: str


Notes = list[Note]
"""Filled by the readers of a row"""


def json_cell(value: dict[str, Any], key: str, parent: str = "") -> Any:
    """The value under a key that takes lists or objects; None for an absent or blank one.

    The JSON text of a list or an object, as CSV and many exports have it, is read as what it holds. `parent` is the
    pointer of `value`. Raises: RowProblem.
    """
    cell = value.get(key)
    return from_json_text(cell, f"{parent}/{key}") if isinstance(cell, str) else cell


def from_json_text(text: str, pointer: str) -> Any:
    """The list or object of a JSON text, None for a blank text or null, and any other text unchanged."""
    if text.lstrip()[:1] in ("[", "{"):
        return parse_json(text, pointer)
    return None if text.strip() in ("", "null") else text


def is_blank(cell: Any) -> bool:
    """Whether a cell says nothing: absent, null, a blank text, or an empty list or object."""
    return cell is None or cell in ([], {}) or (isinstance(cell, str) and cell.strip() in ("", "null", "[]", "{}"))


def optional_text(value: dict[str, Any], column: str) -> str:
    """The text of the column, empty for an absent or null column."""
    return "" if value.get(column) is None else as_text(value[column], f"/{column}")


def as_text(value: Any, pointer: str) -> str:
    if not isinstance(value, str):
        raise RowProblem(pointer, f"must be a string, is {json_type_name(value)}")
    return value


def as_list(value: Any, pointer: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowProblem(pointer, f"must be a list, is {json_type_name(value)}")
    return value


def as_object(value: Any, pointer: str) -> dict[str, Any]:
    """The object, or the object in a JSON text."""
    if isinstance(value, str):
        value = from_json_text(value, pointer)
    if not isinstance(value, dict):
        raise RowProblem(pointer, f"must be an object, is {json_type_name(value)}")
    return value


def require_not_blank(text: str, pointer: str, name: str) -> None:
    if not text.strip():
        raise RowProblem(pointer, f"{name} is empty")


def json_type_name(value: Any) -> str:
    """The JSON name of a value's type, with its article."""
    if value is None:
        return "null or missing"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")
