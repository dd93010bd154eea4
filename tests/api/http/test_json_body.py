from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from api.errors import InvalidJSON
from api.http.json_body import parse_body
from qlora_service.data.json.strict import MAX_NESTING


def test_json_document_is_parsed() -> None:
    assert parse_body('\ufeff{"name": "Überschrift 😀"}'.encode()) == {"name": "Überschrift 😀"}


@pytest.mark.parametrize(
    ("body", "reason", "location"),
    [
        (b"", "Expecting value at line 1, column 1", None),
        (b'{"a": 1,\n "b" 2}', "line 2, column 6", None),
        (b"{} {}", "Extra data at line 1, column 4", None),
        (b'{"a": NaN}', "NaN", None),
        (b'{"a": -Infinity}', "-Infinity", None),
        (b'{"a": 1e999}', "too large", None),
        (b'{"a": ' + b"9" * 5000 + b"}", "too many digits", None),
        (b'{"a": 1, "a": 2}', "'a' is used twice", None),
        (b'{"a": {"b": "\\ud800"}}', "an unpaired surrogate", "/a/b"),
        (b'{"a": ["\\u0000"]}', "NUL", "/a/0"),
        (b"[" * 65 + b"]" * 65, "deeper than 64", None),
        (b"[" * 100_000, "deeper than 64", None),
        (b'{"a": "\xff"}', "0xff at offset 7", None),
    ],
)
def test_ambiguous_or_invalid_json_is_refused_with_its_location(body: bytes, reason: str, location: str | None) -> None:
    with pytest.raises(InvalidJSON, match=reason) as caught:
        parse_body(body)
    assert caught.value.location == location


def test_invalid_json_in_a_form_part_is_refused_with_the_name_of_the_part() -> None:
    with pytest.raises(InvalidJSON, match=r"the part 'config' is not valid JSON: .* at line 1, column 2") as caught:
        parse_body(b"{", "config")
    assert (caught.value.location, caught.value.details) == ("config", {"line": 1, "column": 2})


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()))
_VALUES = st.recursive(
    _SCALARS, lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=2), children)
)
_ENCODED = [
    lambda value: json.dumps(value).encode(),
    lambda value: json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass"),
]
_DEFECTS = [
    b"\0", b"\\u0000", b"\\ud800", b"\xed\xa0\x80", b"\xff", b"\xef\xbb\xbf", b"NaN", b"-Infinity", b"1e999", b'"a":1,',
    b'"a":{},', b"[" * 70, b"]" * 70, b"9" * 5000, b"{", b"\\", b'"',
]  # fmt: skip


@st.composite
def _documents(draw: st.DrawFn) -> bytes:
    """JSON documents, most of them with defects inserted."""
    document = bytearray(draw(st.sampled_from(_ENCODED))(draw(_VALUES)))
    for piece in draw(st.lists(st.sampled_from(_DEFECTS), max_size=3)):
        position = draw(st.integers(0, len(document)))
        document[position:position] = piece
    return bytes(document)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(_documents())
@example(b'{"a": 1, "b": {"a": 2}}')
def test_every_body_is_parsed_unambiguously_or_refused(body: bytes) -> None:
    try:
        value = parse_body(body)
    except InvalidJSON as error:
        json.dumps(error.as_dict(), ensure_ascii=False).encode()  # the error can be sent as JSON
        return
    assert json.loads(body.decode("utf-8-sig"), object_pairs_hook=_without_duplicates) == value
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    assert "\0" not in text
    assert "\\u0000" not in text.replace("\\\\", "")
    text.encode()
    assert _depth(value) <= MAX_NESTING


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def _depth(value: Any) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if children is None else 1 + max(map(_depth, children), default=0)
