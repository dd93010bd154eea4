from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_service.data.json.strict import MAX_NESTING, RowProblem, check_strings, parse_json

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None)
@given(JSON_VALUES, st.booleans())
def test_reads_back_any_value_without_nul(value: Any, ensure_ascii: bool) -> None:
    text = json.dumps(value, ensure_ascii=ensure_ascii)
    if "\\u0000" in json.dumps(value).replace("\\\\", ""):
        with pytest.raises(RowProblem, match="NUL"):
            parse_json(text)
    else:
        assert parse_json(text) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1,}', r"not valid JSON: .* at column 9"),
        ('{"a":\n 1,}', r"at line 2 of the row, column 4"),
        ("", "not valid JSON"),
        ('{"a": 1} x', "Extra data"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"a": 1e999}', "too large for a 64-bit float"),
        ('{"a": %s}' % ("9" * 5000), "too many digits"),
        ('{"a": {"b": 1, "c": 2, "b": 3}}', "the key 'b' is used twice"),
        ('{"a": "tab\there"}', "Invalid control character"),
        ('{"a": "\0"}', "NUL"),
        ("[" * 100_000 + "]" * 100_000, "nested deeper"),
    ],
)
def test_refuses_text_that_is_not_strict_json(text: str, reason: str) -> None:
    with pytest.raises(RowProblem, match=reason) as caught:
        parse_json(text, "/at")
    assert caught.value.pointer == "/at"


@pytest.mark.parametrize(
    ("text", "pointer", "reason"),
    [
        (r'{"a": [{"b~c/d": "x\u0000"}]}', "/a/0/b~0c~1d", "NUL"),
        (r'{"a": "\ud83d"}', "/a", "unpaired surrogate"),
        (r'{"a": "\uDE00\uD83D"}', "/a", "unpaired surrogate"),
        (r'{"a": "\uDFFF"}', "/a", "unpaired surrogate"),
        (r'{"a": {"\ud83d": 1}}', "/a", "unpaired surrogate"),
        (r'{"a": {"%s": "\ud83d"}}' % ("k" * 300), "", "unpaired surrogate"),
    ],
)
def test_points_to_text_that_utf8_cannot_encode(text: str, pointer: str, reason: str) -> None:
    with pytest.raises(RowProblem, match=reason) as caught:
        parse_json(text)
    assert caught.value.pointer == pointer
    caught.value.pointer.encode()


def test_keeps_escaped_pairs_and_escaped_backslashes() -> None:
    assert parse_json(r'{"a": "\ud83d\ude00", "b": "\\u0000 \\ud800"}') == {"a": "😀", "b": r"\u0000 \ud800"}


def test_nesting_is_counted_in_brackets_not_in_text() -> None:
    deepest = "[" * MAX_NESTING + "]" * MAX_NESTING
    assert parse_json(deepest)
    assert parse_json('["%s"]' % ("{[" * 500)) == ["{[" * 500]
    assert parse_json("[" + ",".join(["{}"] * 500) + "]") == [{}] * 500
    with pytest.raises(RowProblem, match="nested deeper than 64"):
        parse_json(f"[{deepest}]")


def test_check_strings_counts_keys_and_strings() -> None:
    assert check_strings({"ab": ["cd", 1, None, {"e": "fgh"}]}) == 8
