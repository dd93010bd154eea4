"""JSON as RFC 8259 means it: one reading only, or a `RowProblem` that says where it is ambiguous or broken."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

# Deeper rows are mistakes or attacks; a tool schema, the deepest honest value, stays below 20.
MAX_NESTING = 64
# A pointer is read by people; a key may be as long as its row.
MAX_POINTER_CHARS = 200

# Only these escapes can bring a NUL or half a surrogate pair into a string decoded from valid UTF-8.
_SUSPICIOUS_ESCAPE = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")


class RowProblem(Exception):
    """Why one row cannot be used: a reason, and the JSON pointer (RFC 6901) to its place in the row."""

    def __init__(self, pointer: str, reason: str) -> None:
        super().__init__(pointer, reason)
        self.pointer = pointer if len(pointer) <= MAX_POINTER_CHARS else ""
        self.reason = reason


def parse_json(text: str, pointer: str = "") -> Any:
    """The value of a JSON text, which stands at `pointer` of its row.

    Raises:
        RowProblem: invalid JSON, NaN or Infinity, a key used twice, a NUL character, half a surrogate
            pair, nesting deeper than `MAX_NESTING`.
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
    except ValueError:  # Python's cap on the digits of an int
        raise RowProblem(pointer, "a number has too many digits") from None
    # The brackets bound the depth from above, and counting them is a hundred times cheaper than the walk.
    if text.count("[") + text.count("{") > MAX_NESTING and _nesting(value) > MAX_NESTING:
        raise RowProblem(pointer, f"nested deeper than {MAX_NESTING} levels")
    if _SUSPICIOUS_ESCAPE.search(text):
        check_strings(value, pointer)
    return value


def check_strings(value: Any, pointer: str = "") -> int:
    """The characters of all keys and strings in `value`.

    Raises:
        RowProblem: one holds a NUL character or half a surrogate pair, which no UTF-8 text can hold.
    """
    total = 0
    for place, text in _strings(value, pointer):
        if "\0" in text:
            raise RowProblem(place, "contains a NUL character")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RowProblem(place, "contains half a surrogate pair (\\ud800 to \\udfff)") from None
        total += len(text)
    return total


def _strings(value: Any, pointer: str) -> Iterator[tuple[str, str]]:
    # A key stands at its object's pointer: it comes before its value, so no pointer holds an unchecked key.
    if isinstance(value, str):
        yield pointer, value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield pointer, key
            yield from _strings(child, f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}")
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _strings(child, f"{pointer}/{index}")


def _nesting(value: Any) -> int:
    depth = 0
    level = [value] if isinstance(value, dict | list) else []
    while level:
        depth += 1
        children = (child for parent in level for child in (parent.values() if isinstance(parent, dict) else parent))
        level = [child for child in children if isinstance(child, dict | list)]
    return depth


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise RowProblem("", f"the key {key[:60]!r} is used twice in one object")
    return value


def _constant(name: str) -> Any:
    raise RowProblem("", f"not valid JSON: {name} is not a number of JSON")


def _float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise RowProblem("", "a number is too large for a 64-bit float")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
