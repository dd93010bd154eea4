from __future__ import annotations

import io
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_service.data.files import splitting
from qlora_service.data.files.splitting import (
    MAX_ROW_BYTES,
    UTF8_BOM,
    array_elements,
    csv_records,
    line_blocks,
    lines,
    text_documents,
)

# Text full of characters that could be mistaken for structure.
TRICKY = st.text(alphabet='a"\\[]{},:\n é😀', max_size=12)


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "_CHUNK_BYTES", 3)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([b"a", b"bcde", b"\n", b"\r\n", b"\r", b"\xe2\x80\xa8", b"\x0c", UTF8_BOM]), max_size=30),
    st.integers(1, 8),
    st.integers(8, 12),
)
def test_lines_do_not_depend_on_the_block_size(parts: list[bytes], block_bytes: int, max_bytes: int) -> None:
    data = b"".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splitting, "_BLOCK_BYTES", block_bytes)
        patch.setattr(splitting, "MAX_ROW_BYTES", max_bytes)
        pieces = list(lines(io.BytesIO(data)))
    offset = len(UTF8_BOM) if data.startswith(UTF8_BOM) else 0
    raws = [raw for raw in re.split(rb"(?<=\n)", data[offset:]) if raw]
    assert [piece.line for piece in pieces] == list(range(1, len(raws) + 1))
    for raw, piece in zip(raws, pieces, strict=True):
        kept = len(raw.rstrip(b"\r\n")) <= max_bytes
        assert (piece.offset, piece.raw, piece.problem is None) == (offset, raw if kept else b"", kept)
        offset += len(raw)


def test_ordinary_lines_are_grouped_into_blocks() -> None:
    data = b'{"text": "a"}\r\n' * 10_000
    blocks = list(line_blocks(io.BytesIO(data)))
    assert len(blocks) < 30
    assert b"".join(block.raw for block in blocks) == data


def test_line_longer_than_a_block_is_its_own_block() -> None:
    long = b"x" * 100_000 + b"\n"
    blocks = list(line_blocks(io.BytesIO(b"a\n" + long + b"b")))
    assert [(block.line, block.offset, block.raw) for block in blocks] == [
        (1, 0, b"a\n"),
        (2, 2, long),
        (3, 2 + len(long), b"b"),
    ]


def test_line_over_the_limit_is_dropped() -> None:
    data = b"a\n" + b"x" * (MAX_ROW_BYTES + 1) + b"\nb"
    _, long, last = line_blocks(io.BytesIO(data))
    assert (long.line, long.offset, long.raw) == (2, 2, b"")
    assert "longer than 16 MiB" in str(long.problem)
    assert (last.line, last.offset, last.raw) == (3, len(data) - 1, b"b")


def test_lines_count_bytes_through_bom_crlf_and_blank_lines() -> None:
    data = "\ufeff{é}\r\n\r\n  \n{b}".encode()
    assert [(line.line, line.offset) for line in lines(io.BytesIO(data)) if not line.is_blank] == [(1, 3), (4, 14)]
    assert data[14:] == b"{b}"


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_line_of_the_limit_is_kept_and_one_byte_more_is_not(end: bytes) -> None:
    (kept,) = lines(io.BytesIO(b"x" * MAX_ROW_BYTES + end))
    assert (len(kept.raw), kept.problem) == (MAX_ROW_BYTES + len(end), None)
    (dropped,) = lines(io.BytesIO(b"x" * (MAX_ROW_BYTES + 1) + end))
    assert (dropped.raw, dropped.offset) == (b"", 0)
    assert "longer than 16 MiB" in str(dropped.problem)


def test_line_after_a_too_long_line_has_the_right_place() -> None:
    data = b"x" * (2 * MAX_ROW_BYTES) + b"\n{}\n"
    *_, last = lines(io.BytesIO(data))
    assert (last.line, data[last.offset :], last.raw) == (2, b"{}\n", b"{}\n")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.dictionaries(TRICKY, TRICKY | st.lists(TRICKY, max_size=3), max_size=3), max_size=5),
    st.sampled_from([None, 1]),
    st.integers(1, 9),
)
def test_array_elements_have_the_right_offsets(rows: list[object], indent: int | None, chunk_bytes: int) -> None:
    data = b" " + json.dumps(rows, ensure_ascii=False, indent=indent).encode() + b"\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splitting, "_CHUNK_BYTES", chunk_bytes)
        pieces = list(array_elements(io.BytesIO(data), 2))
    assert [json.loads(piece.raw) for piece in pieces] == rows
    assert [piece.line for piece in pieces] == list(range(1, len(rows) + 1))
    assert all(data[piece.offset :].startswith(piece.raw) for piece in pieces)


@pytest.mark.parametrize(
    ("data", "raws", "problem"),
    [
        (b"[]", [], None),
        (b"[ \n ] \n", [], None),
        (b"[1,]", [b"1", b""], None),
        (b'[{"a": 1} x, }, {"b": 2}]', [b'{"a": 1} x', b"}", b'{"b": 2}'], None),
        (b'[{"a": 1}, {"b": "]', [b'{"a": 1}', b""], "ends inside this row"),
        (b'[{"a": 1}, tru', [b'{"a": 1}', b""], "ends inside this row"),
        (b'[{"a": 1},', [b'{"a": 1}', b""], "without its closing bracket"),
        (b'[{"a": 1} ', [b'{"a": 1} ', b""], "without its closing bracket"),
        (b"[", [b""], "without its closing bracket"),
        (b"[{}] \n [{}]", [b"{}", b""], "after the closing bracket"),
    ],
)
def test_broken_array_gives_its_rows_then_one_problem(
    tiny_chunks: None, data: bytes, raws: list[bytes], problem: str | None
) -> None:
    pieces = list(array_elements(io.BytesIO(data), 1))
    assert [piece.raw for piece in pieces] == raws
    assert [piece.problem is not None for piece in pieces] == [False] * (len(raws) - 1) + [problem is not None] * bool(
        raws
    )
    if problem is not None:
        assert problem in str(pieces[-1].problem)


def test_array_continues_after_an_element_over_the_limit() -> None:
    data = b'[ {"a": "%s"}, {"b": 1}]' % (b"x" * MAX_ROW_BYTES)
    long, short = array_elements(io.BytesIO(data), 1)
    assert (long.raw, long.offset) == (b"", 2)
    assert "longer than 16 MiB" in str(long.problem)
    assert (short.raw, short.line, data[short.offset :]) == (b'{"b": 1}', 2, b'{"b": 1}]')


def test_place_of_a_document_is_its_first_line() -> None:
    data = b"\n\none\ntwo\r\n \r\n\nthree"
    pieces = list(text_documents(io.BytesIO(data)))
    assert [(piece.line, piece.raw) for piece in pieces] == [(3, b"one\ntwo\r\n"), (7, b"three")]
    assert all(data[piece.offset :].startswith(piece.raw) for piece in pieces)


def test_document_over_the_limit_is_one_problem() -> None:
    half = b"x" * (MAX_ROW_BYTES // 2) + b"\n"
    first, second = text_documents(io.BytesIO(half * 3 + b"\nshort"))
    assert (first.line, first.raw, second.raw) == (1, b"", b"short")
    assert "longer than 16 MiB" in str(first.problem)


def test_place_of_a_csv_record_is_its_first_line() -> None:
    data = 'a,b\r\n"é\nx",1\r\n\r\n2,"3 ""q"""'.encode()
    records = list(csv_records(io.BytesIO(data), ","))
    assert [(record.line, record.fields) for record in records] == [
        (1, ["a", "b"]),
        (2, ["é\nx", "1"]),
        (5, ["2", '3 "q"']),
    ]
    assert [data[record.offset :][:3] for record in records] == [b"a,b", '"é'.encode(), b'2,"']


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (b'"a"b,1\n', "not valid CSV"),
        (b"\xff\xfe,1\n", "byte 0xff at offset 4 of the file is not valid UTF-8"),
        (b'"x\n\xff",1\n', "byte 0xff at offset 7 of the file is not valid UTF-8"),
        (b"a\0,1\n", "NUL"),
        (b'"%s",1\n' % (b"x" * MAX_ROW_BYTES), "longer than 16 MiB"),
        (b'"%s","\n' % (b"x" * (MAX_ROW_BYTES - 9)) + b'123456789",1\n', "longer than 16 MiB"),
    ],
)
def test_csv_continues_after_a_broken_record(broken: bytes, problem: str) -> None:
    _, bad, good = csv_records(io.BytesIO(b"h,i\n" + broken + b"c,d\n"), ",")
    assert problem in str(bad.problem)
    assert (bad.line, bad.offset, good.fields, good.offset) == (2, 4, ["c", "d"], 4 + len(broken))


def test_unclosed_csv_quote_is_a_problem_at_its_record() -> None:
    _, bad = csv_records(io.BytesIO(b'a,b\n"x,1\n2,3\n'), ",")
    assert (bad.line, bad.offset, bad.fields) == (2, 4, [])
    assert "not valid CSV" in str(bad.problem)


def test_csv_field_may_be_longer_than_the_default_of_the_csv_module() -> None:
    _, record = csv_records(io.BytesIO(b"a,b\n" + b"x" * 200_000 + b",1\n"), ",")
    assert len(record.fields[0]) == 200_000
