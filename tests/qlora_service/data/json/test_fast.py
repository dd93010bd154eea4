from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlora_service.data.json.fast import JSON_WHITESPACE, parse_lines, parse_row
from qlora_service.data.json.strict import RowProblem, parse_json
from tests.planted_errors import PLANTED

CHARACTERS = ["a", "b", " ", "é", "😀", "\x7f", "\u2028", "\t", "\0", "[", "{", ":", ",", "NaN"]
ESCAPES = [r"\"", r"\\", r"\/", r"\n", r"\x", r"\u0061", r"\u0022", r"\u005c", r"\u0000", r"\u00e9"]
SURROGATES = [r"\ud83d\ude00", r"\uD83D", r"\ude00"]
PARTS = st.sampled_from([*CHARACTERS, *ESCAPES, *SURROGATES])
STRINGS = st.lists(PARTS, max_size=3).map(lambda parts: f'"{"".join(parts)}"')
FLOATS = ["-0.0", "1.0", "1E+2", "0.1", "5e-324", "1e-400", "1e308", "1e309", "1e23", "2.2250738585072011e-308"]
INTS = ["0", "-0", "9007199254740993", "18446744073709551616", "-9223372036854775809", "9" * 4300, "9" * 4301]
OTHERS = ["NaN", "Infinity", "-Infinity", "01", "1.", ".5", "+1", "1e", "0x1", "true", "false", "null", "True", "nul"]
NUMBERS = st.sampled_from([*FLOATS, *INTS, *OTHERS]) | st.floats().map(repr)
SPACING = st.sampled_from(["", "", "", " ", "\t ", "\r", "\x0c", "\xa0"])


def _object(pairs: list[tuple[str, str]], spacing: str) -> str:
    return "{" + f"{spacing},".join(f"{key}{spacing}:{spacing}{value}" for key, value in pairs) + "}"


TEXTS = st.recursive(
    STRINGS | NUMBERS,
    lambda inner: (
        st.builds(_object, st.lists(st.tuples(STRINGS, inner), max_size=4), SPACING)
        | st.lists(inner, max_size=3).map(lambda parts: f"[{', '.join(parts)}]")
    ),
    max_leaves=8,
)
"""JSON texts: almost always well formed, rarely valid as a row."""
OBJECTS = st.builds(_object, st.lists(st.tuples(STRINGS, TEXTS), max_size=4), SPACING)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """The text of an object, sometimes with a few bytes replaced."""
    text = draw(OBJECTS).encode()
    if draw(st.booleans()):
        return text
    start = draw(st.integers(0, len(text)))
    return text[:start] + draw(st.binary(max_size=2)) + text[start + draw(st.integers(0, 2)) :]


def read_strictly(text: bytes) -> Any:
    """The row that `strict` reads; None if it refuses the text as a row."""
    try:
        value = parse_json(text.decode())
    except (RowProblem, UnicodeDecodeError):
        return None
    return value if isinstance(value, dict) else None


@settings(max_examples=250, deadline=None)
@given(damaged() | st.binary(max_size=12))
@example(b'{"a": "\\ud800\\ud83d\\ude00"}')
@example(b'{"a": 1, "a": "\\u0022\\u0022"}')
def test_row_has_the_value_that_strict_reads(text: bytes) -> None:
    value = parse_row(text)
    # repr distinguishes 1 from 1.0 and True, 0.0 from -0.0, and different orders of the keys.
    assert value is None or repr(value) == repr(read_strictly(text))


@settings(max_examples=100, deadline=None)
@given(st.lists(damaged(), min_size=1, max_size=4), st.sampled_from([b"\n", b"\r\n", b"\n \t\n"]))
@example([b'{"a": 1, "a": ""}', b'{"a": "\\u0022\\u0022\\u0022\\u0022"}'], b"\n")
@example([b'{"a": 1', b'"b": 2}'], b",\n")
def test_lines_are_read_only_if_strict_reads_every_line(texts: list[bytes], separator: bytes) -> None:
    text = separator.join(texts)
    lines = [line for line in text.split(b"\n") if line.strip(JSON_WHITESPACE)]
    values = parse_lines(text)
    assert values is None or repr(values) == repr([read_strictly(line) for line in lines])


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.reason[:40])
def test_row_that_strict_refuses_is_not_read(planted: Any) -> None:
    if read_strictly(planted.line) is None:
        assert parse_row(planted.line) is None


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=5),
        st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.lists(st.booleans()),
        max_size=4,
    ),
    st.booleans(),
)
def test_ordinary_rows_are_read(row: dict[str, Any], ensure_ascii: bool) -> None:
    text = json.dumps(row, ensure_ascii=ensure_ascii)
    if "\\u0000" not in text:
        assert repr(parse_row(text.encode())) == repr(row)
        assert parse_lines(f"{text}\n\r\n{text}\r\n".encode()) == [row, row]


def test_only_blank_lines_are_skipped() -> None:
    assert parse_lines(b"\n \t\r\n{}\n\r\n") == [{}]
    assert parse_lines(b"{}\n\x0c\n") is None


def test_nesting_of_tool_calls_is_read_and_deeper_nesting_is_not() -> None:
    nested = [f'{{"a": {"[" * levels}{"]" * levels}}}'.encode() for levels in range(1, 70)]
    is_read = [parse_row(text) is not None for text in nested]
    assert is_read == [levels < 8 for levels in range(1, 70)]
