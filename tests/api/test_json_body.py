from __future__ import annotations

import pytest

from api.errors import InvalidJSON
from api.json_body import parse_body


def test_json_document_is_read() -> None:
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
        (b'{"a": {"b": "\\ud800"}}', "half a surrogate pair", "/a/b"),
        (b'{"a": ["\\u0000"]}', "NUL", "/a/0"),
        (b"[" * 65 + b"]" * 65, "deeper than 64", None),
        (b"[" * 100_000, "deeper than 64", None),
        (b'{"a": "\xff"}', "0xff at offset 7", None),
    ],
)
def test_ambiguous_or_broken_json_is_refused_with_its_place(body: bytes, reason: str, location: str | None) -> None:
    with pytest.raises(InvalidJSON, match=reason) as caught:
        parse_body(body)
    assert caught.value.location == location
