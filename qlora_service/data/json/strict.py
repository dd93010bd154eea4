"""Strict JSON (RFC 8259): a text with exactly one reading, or a `RowProblem` that locates the ambiguity or error."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

# Deeper rows are mistakes or attacks; tool schemas, the deepest legitimate values, stay below 20.
MAX_NESTING = 64
# Pointers are shown to users, and a key may be as long as its row.
MAX_POINTER_CHARS = 200

# Only these escapes can put a NUL or an unpaired surrogate into a string decoded from valid UTF-8.
_SUSPICIOUS_ESCAPE = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")


class RowProblem(Exception):
    """An unusable row: the reason, and the JSON pointer (RFC 6901) to the place in the row."""

    def __init__(self, pointer: str, reason: str) -> None:
        super().__init__(pointer, reason)
        self.pointer = pointer if len(pointer) <= MAX_POINTER_CHARS else ""
        self.reason = reason


def parse_json(text: str, pointer: str = "") -> Any:
    """The value of a JSON text located at `pointer` of its row.

    Raises:
        RowProblem: invalid JSON, NaN or Infinity, a duplicate key, a NUL character, an unpaired surrogate,
            nesting deeper than `MAX_NESTING`.
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if "\0" in text:
            raise RowProblem(pointer, "contains a NUL character") from None
        place = f"column {error.colno}"
        if error.lineno > 1:
            place = f"line {error.lineno} of the row, {place}"
        raise RowProblem(pointer, f"not valid JSON: {error.msg} at {place}") from None
    except RecursionError:
        raise RowProblem(pointer, f"nested deeper than {MAX_NESTING} levels") from None
    except RowProblem as problem:
        raise RowProblem(pointer, problem.reason) from None
    except ValueError:  # Python's limit on the digits of an int
        raise RowProblem(pointer, "a number has too many digits") from None
    # The number of brackets is an upper bound of the depth, a hundred times cheaper than walking the value.
    if text.count("[") + text.count("{") > MAX_NESTING and _depth(value) > MAX_NESTING:
        raise RowProblem(pointer, f"nested deeper than {MAX_NESTING} levels")
    if _SUSPICIOUS_ESCAPE.search(text):
        check_strings(value, pointer)
    return value


def check_strings(value: Any, pointer: str = "") -> int:
    """Number of characters in all keys and strings of `value`.

    Raises:
        RowProblem: a key or string contains a NUL character or an unpaired surrogate, which UTF-8 cannot encode.
    """
    total = 0
    for string_pointer, text in _strings(value, pointer):
        if "\0" in text:
            raise RowProblem(string_pointer, "contains a NUL character")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RowProblem(string_pointer, "contains an unpaired surrogate (\\ud800 to \\udfff)") from None
        total += len(text)
    return total


def _strings(value: Any, pointer: str) -> Iterator[tuple[str, str]]:
    """Every key and string with its pointer."""
    # A key has the pointer of its object and is yielded before its value, so no pointer contains an unchecked key.
    if isinstance(value, str):
        yield pointer, value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield pointer, key
            yield from _strings(child, f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}")
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _strings(child, f"{pointer}/{index}")


def _depth(value: Any) -> int:
    depth = 0
    level = [value] if isinstance(value, dict | list) else []
    while level:
        depth += 1
        children = (child for parent in level for child in (parent.values() if isinstance(parent, dict) else parent))
        level = [child for child in children if isinstance(child, dict | list)]
    return depth


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise RowProblem("", f"the key {key[:60]!r} is used twice in one object")
    return value


def _refuse_constant(name: str) -> Any:
    raise RowProblem("", f"not valid JSON: {name} is not a JSON number")


def _finite_float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise RowProblem("", "a number is too large for a 64-bit float")
    return number


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object_without_duplicates, parse_constant=_refuse_constant, parse_float=_finite_float
)
