"""Ordinary JSON rows, read at several times the speed of `strict_json`; any other is left to it.

What is read here is what `strict_json.parse_json` accepts, with the same value. msgspec keeps RFC 8259 by itself: it
refuses what is not UTF-8 or not JSON, NaN, control characters, half surrogate pairs, numbers beyond a float and ints
of more digits than Python takes. What it lets pass is found otherwise:

- a key used twice: msgspec keeps the last value and drops the key, which is in quotes, and what it had before. So the
  row has more quotation marks than the value written out again; a kept string has as many in both, whatever its other
  escapes, as long as no mark was written as \\u0022. A row cannot have fewer: of many rows only the sums are compared.
- NUL: in a string it can only come from \\u0000.
- nesting: the decoder's type is not deeper than `_LEVELS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import GenericAlias
from typing import Any

import msgspec

BLANKS = b" \t\r\n"
"""JSON's white space"""
_OTHER_ESCAPES = (b"\\u0000", b"\\u0022")
# Enough for the arguments of tool calls. msgspec builds two types for each level, so no limit of many levels.
_LEVELS = 8


def _nested(levels: int) -> Any:
    """The type of JSON values of at most so many lists and objects inside one another."""
    scalar: Any = str | int | float | bool | None
    if not levels:
        return scalar
    inner = _nested(levels - 1)
    return scalar | GenericAlias(list, inner) | GenericAlias(dict, (str, inner))


_decoder: msgspec.json.Decoder[dict[str, Any]] = msgspec.json.Decoder(GenericAlias(dict, (str, _nested(_LEVELS - 1))))
_encoder = msgspec.json.Encoder()


def parse_row(text: bytes) -> dict[str, Any] | None:
    """The JSON object that the text is; None if `strict_json` has to say."""
    values = _parse(text, [text])
    return None if values is None else values[0]


def parse_lines(text: bytes) -> list[dict[str, Any]] | None:
    """The JSON objects on the lines of the text, blank ones passed over; None if `strict_json` has to say of one."""
    return _parse(text, [line for line in text.split(b"\n") if line.strip(BLANKS)])


def _parse(text: bytes, rows: Sequence[bytes]) -> list[dict[str, Any]] | None:
    if any(escape in text for escape in _OTHER_ESCAPES):
        return None
    try:
        values = list(map(_decoder.decode, rows))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return values if _encoder.encode(values).count(b'"') == text.count(b'"') else None
