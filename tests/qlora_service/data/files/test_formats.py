from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_service.data.files.formats import RawRow, detect_container, read_rows
from qlora_service.data.rows.examples import Container
from qlora_service.errors import InvalidDataset

FILE_PROPERTY = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
GREETINGS = "Grüß dich · 你好 · नमस्ते · שלום · 안녕 · 👩‍👩‍👧"


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.jsonl", '{"text": "a"}')
    return buffer.getvalue()


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, **options)
    return buffer.getvalue()


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    """The path of an upload, a name without an extension."""
    return tmp_path / "upload"


def read(path: Path, data: bytes | str, container: Container) -> list[RawRow]:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return list(read_rows(path, container))


def values(rows: list[RawRow]) -> list[dict[str, Any] | None]:
    return [row.value for row in rows]


def reasons(rows: list[RawRow]) -> list[str]:
    return [row.finding.reason for row in rows if row.finding is not None]


@pytest.mark.parametrize(
    ("data", "filename", "container"),
    [
        ('{"text": "a"}\n', None, "jsonl"),
        ('\ufeff\r\n {"text": "a"}', "x.jsonl", "jsonl"),
        ('{"text": "a"}\n{"text": "b"}', "x.json", "jsonl"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "x.jsonl", "jsonl"),
        ('{"tags": ["a"], "text": "b"}', None, "jsonl"),
        ('not json\n{"text": "a"}', "x.jsonl", "jsonl"),
        ('{"text": "a\0b"}' + " " * 20, "x.jsonl", "jsonl"),
        ('[{"text": "a"}]', None, "json"),
        ('[{"text": "a"}]', "x.jsonl", "json"),
        ("[1]", "x.json", "json"),
        ("instruction,output\na,b\n", None, "csv"),
        (",prompt;completion\n0;a;b\n".replace(",", ";", 1), None, "csv"),
        ("a,b\n1,2\n", "x.csv", "csv"),
        ("text\nhello\n", "X.CSV", "csv"),
        ("a\tb\n", "x.tsv", "csv"),
        ("a,b\n1,2\n", "x.txt", "text"),
        ("[Chapter 1] Call me Ishmael.\n", None, "text"),
        ("{Chapter 1} Call me Ishmael.\n", None, "text"),
        (GREETINGS, None, "text"),
        (parquet([{"text": "a"}]), None, "parquet"),
        (parquet([{"text": "a"}]), "x.parquet", "parquet"),
    ],
)
def test_container_is_detected_by_content(
    upload: Path, data: bytes | str, filename: str | None, container: Container
) -> None:
    upload.write_bytes(data.encode() if isinstance(data, str) else data)
    assert detect_container(upload, filename) == container


@pytest.mark.parametrize(
    ("data", "filename", "message"),
    [
        ("", "x.jsonl", "is empty"),
        ("\ufeff \n\r\n", "x.txt", "is empty"),
        ('{"text": "a"}', "x.parquet", "seems to be JSON Lines, not Parquet"),
        ("hello", "x.parquet", "seems to be plain text, not Parquet"),
        ("instruction,output\na,b\n", "x.json", "seems to be CSV, not a JSON array"),
        ("a,b\n1,2\n", "x.jsonl", "seems to be CSV, not JSON Lines"),
        ("Call me Ishmael.", "x.jsonl", "seems to be plain text, not JSON Lines"),
        ('[{"text": "a"}]', "x.csv", "seems to be a JSON array, not CSV"),
        ('{"text": "a"}', "x.txt", "seems to be JSON Lines, not plain text"),
        (parquet([{"text": "a"}]), "x.jsonl", "seems to be Parquet, not JSON Lines"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "x.jsonl", "seems to be a PNG image"),
        (zipped(), "x.jsonl", "seems to be a ZIP archive"),
        (gzip.compress(b'{"text": "a"}', mtime=0), "x.jsonl", "seems to be gzip-compressed"),
        ('{"text": "a"}'.encode("utf-16"), "x.jsonl", "UTF-16"),
        ('{"text": "a"}'.encode("utf-16-le"), "x.jsonl", "UTF-16"),
        (bytes(range(256)), None, "binary data"),
        ('{"data": [{"text": "a"}]}', "x.json", "rows under 'data'"),
        ('{\n "rows": [\n {"text": "a"}\n]}', None, "rows under 'rows'"),
        ('{"rows": [{"text": "a"},\n{"text": "b"}]}', "x.json", "rows under 'rows'"),
        ('{\n "text": "a"\n}\n', "x.json", "objects that span lines"),
    ],
)
def test_file_in_an_unexpected_format_is_refused(
    upload: Path, data: bytes | str, filename: str | None, message: str
) -> None:
    upload.write_bytes(data.encode() if isinstance(data, str) else data)
    with pytest.raises(InvalidDataset, match=message):
        detect_container(upload, filename)


def test_jsonl_row_has_the_right_line_and_byte_offset(upload: Path) -> None:
    data = f'\ufeff{{"text": "{GREETINGS}"}}\r\n\n{{"text": "b"}}'.encode()
    first, second = read(upload, data, "jsonl")
    assert (first.value, first.line, first.byte_offset) == ({"text": GREETINGS}, 1, 3)
    assert (second.value, second.line, second.byte_offset) == ({"text": "b"}, 3, data.rindex(b"{"))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"text": "\xff"}', "byte 0xff at offset 25 of the file is not valid UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', "not valid UTF-8"),
        (b'{"text": }', "not valid JSON: Expecting value at column 10"),
        (b'["text"]', "must be a JSON object"),
        (b'{"text": NaN}', "NaN"),
        (b'{"text": "a", "text": "b"}', "used twice"),
        (b'{"text": "\\ud800"}', "unpaired surrogate"),
        (b'{"text": "\\u0000"}', "NUL"),
        (b'{"text": ' + b"[" * 64 + b"]" * 64 + b"}", "nested deeper"),
        (b'{"text": "' + b"x" * 2**24 + b'"}', "longer than 16 MiB"),
    ],
)
@pytest.mark.parametrize(
    ("container", "template"),
    [("jsonl", b'{"text": "a"}\n %b\n{"text": "b"}\n'), ("json", b'[{"text": "a"},%b,{"text": "b"}]')],
)
def test_bad_row_is_a_finding_and_the_next_row_is_read(
    upload: Path, bad: bytes, reason: str, container: Container, template: bytes
) -> None:
    data = template % bad
    first, middle, last = read(upload, data, container)
    assert (first.value, middle.value, last.value) == ({"text": "a"}, None, {"text": "b"})
    finding = middle.finding
    assert finding is not None
    # In JSONL a row begins with its line, here one space before the object.
    assert (finding.line, finding.byte_offset) == (2, data.index(bad) - (container == "jsonl"))
    assert reason.replace("column 10", f"column {10 + (container == 'jsonl')}") in finding.reason


@FILE_PROPERTY
@given(
    st.lists(st.dictionaries(st.text('ab\\"é漢😀[{,\n', max_size=4), st.text(max_size=6) | st.integers(), max_size=3)),
    st.sampled_from(["\n", "\r\n", "\n\n \r\n"]),
    st.booleans(),
    st.booleans(),
)
def test_byte_offset_points_to_the_row(
    upload: Path, rows: list[dict[str, Any]], newline: str, bom: bool, ensure_ascii: bool
) -> None:
    texts = [json.dumps(row, ensure_ascii=ensure_ascii) for row in rows]
    texts = [text.replace("\\u0000", "0") for text in texts]
    mark = "\ufeff" if bom else ""
    for container, data in (
        ("jsonl", mark + newline.join(texts)),
        ("json", f"{mark}{newline}[{f' ,{newline}'.join(texts)}]{newline}"),
    ):
        read_back = read(upload, data, container)  # type: ignore[arg-type]
        assert values(read_back) == [json.loads(text) for text in texts]
        for row, text in zip(read_back, texts, strict=True):
            assert row.byte_offset is not None
            assert data.encode()[row.byte_offset :].startswith(text.encode())


@FILE_PROPERTY
@given(
    st.binary(max_size=80)
    | st.text('{}[]",:\\u08dn\n\r\t;12 eé\0', max_size=60).map(str.encode)
    | st.tuples(st.just(b"PAR1"), st.binary(max_size=40), st.just(b"PAR1")).map(b"".join),
    st.sampled_from([None, "x.jsonl", "x.json", "x.csv", "x.parquet", "x.txt"]),
)
def test_any_bytes_give_rows_findings_or_invalid_dataset(upload: Path, data: bytes, filename: str | None) -> None:
    upload.write_bytes(data)
    containers: list[Container] = ["jsonl", "json", "csv", "parquet", "text"]
    try:
        containers.append(detect_container(upload, filename))
    except InvalidDataset as error:
        error.message.encode()
    for container in containers:
        try:
            rows = list(read_rows(upload, container))
        except InvalidDataset:
            continue
        for row in rows:
            assert (row.value is None) == (row.finding is not None)
            if row.finding is not None:
                assert "\0" not in str(row.finding)
                str(row.finding).encode()


def test_truncated_array_gives_the_rows_before_then_one_finding(upload: Path) -> None:
    rows = read(upload, '[{"text": "a"}, {"text": "b"}, {"text": "c', "json")
    assert values(rows) == [{"text": "a"}, {"text": "b"}, None]
    assert "ends inside this row" in reasons(rows)[0]
    assert (rows[2].line, rows[2].byte_offset) == (3, 31)


@pytest.mark.parametrize("data", ['{"data": [{"text": "a"}]}', '{"text": "a"}\n', "", "text"])
def test_json_container_must_be_an_array(upload: Path, data: str) -> None:
    with pytest.raises(InvalidDataset, match="not a JSON array"):
        read(upload, data, "json")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_reads_any_delimiter(upload: Path, delimiter: str) -> None:
    lines = ["prompt|completion|id", f'"a, b; c\n\t"|{GREETINGS}|1', "d|e|2"]
    first, second = read(upload, "\ufeff" + "\r\n".join(line.replace("|", delimiter) for line in lines), "csv")
    assert first.value == {"prompt": "a, b; c\n\t", "completion": GREETINGS, "id": "1"}
    assert (second.value, second.line) == ({"prompt": "d", "completion": "e", "id": "2"}, 4)
    assert second.byte_offset == upload.read_bytes().rindex(b"d" + delimiter.encode())


def test_csv_row_with_another_number_of_columns_is_a_finding(upload: Path) -> None:
    rows = read(upload, "prompt,completion\na\nb,c,d\ne,f\n", "csv")
    assert values(rows) == [None, None, {"prompt": "e", "completion": "f"}]
    assert reasons(rows) == [
        "has 1 columns where the header has 2",
        "has 3 columns where the header has 2",
    ]


def test_csv_header_is_trimmed_and_columns_without_a_name_are_ignored(upload: Path) -> None:
    assert values(read(upload, ", text \n0,a\n", "csv")) == [{"text": "a"}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "is empty"),
        ("text,text\na,b\n", "two columns named 'text'"),
        (b"text\xff\na\n", "header row .* not valid UTF-8"),
    ],
)
def test_csv_without_a_usable_header_is_refused(upload: Path, data: bytes | str, message: str) -> None:
    with pytest.raises(InvalidDataset, match=message):
        read(upload, data, "csv")


def test_parquet_rows_are_numbered_across_row_groups(upload: Path) -> None:
    source = [{"messages": [{"role": "user", "content": f"{GREETINGS} {n}"}]} for n in range(50)]
    rows = read(upload, parquet(source, row_group_size=7), "parquet")
    assert values(rows) == source
    assert [(row.line, row.byte_offset) for row in rows] == [(n, None) for n in range(1, 51)]


def test_parquet_columns_that_no_shape_reads_keep_only_their_names(upload: Path) -> None:
    table = pa.table({"text": ["a"], "seen": pa.array([1], pa.timestamp("ns")), "raw": [b"\xff"]})
    pq.write_table(table, upload)
    assert values(list(read_rows(upload, "parquet"))) == [{"text": "a", "seen": None, "raw": None}]


def test_parquet_string_with_invalid_utf8_or_nul_is_a_finding(upload: Path) -> None:
    latin = pa.array([b"a", b"caf\xe9", b"nul\0"]).view(pa.string())
    pq.write_table(pa.table({"text": latin}), upload)
    rows = list(read_rows(upload, "parquet"))
    assert values(rows) == [{"text": "a"}, None, None]
    assert reasons(rows) == ["a string is not valid UTF-8", "contains a NUL character"]


def test_parquet_row_over_the_limit_is_a_finding(upload: Path) -> None:
    rows = read(upload, parquet([{"text": "x" * (2**24 + 1)}, {"text": "b"}]), "parquet")
    assert values(rows) == [None, {"text": "b"}]
    assert reasons(rows) == ["longer than 16 MiB: split it into shorter rows"]


def test_damaged_parquet_is_refused(upload: Path) -> None:
    whole = parquet([{"text": "abcdefgh" * 9 + str(n)} for n in range(3000)], compression="gzip", row_group_size=500)
    with pytest.raises(InvalidDataset, match="damaged after row 0"):
        read(upload, whole[:-40], "parquet")
    damaged = whole[: len(whole) // 2] + bytes(400) + whole[len(whole) // 2 + 400 :]
    with pytest.raises(InvalidDataset, match=r"damaged after row [1-9]"):
        read(upload, damaged, "parquet")


def test_text_documents_are_separated_by_blank_lines(upload: Path) -> None:
    data = f"{GREETINGS}\r\nsecond line\r\n\r\n \n\nthird".encode()
    rows = read(upload, data, "text")
    assert values(rows) == [{"text": f"{GREETINGS}\nsecond line"}, {"text": "third"}]
    assert [(row.line, row.byte_offset) for row in rows] == [(1, 0), (6, len(data) - 5)]


def test_unreadable_text_document_is_a_finding(upload: Path) -> None:
    rows = read(upload, b"a\nb\xff\n\nc\0\n\nd", "text")
    assert values(rows) == [None, None, {"text": "d"}]
    assert reasons(rows) == [
        "byte 0xff at offset 3 of the file is not valid UTF-8: save the file as UTF-8",
        "contains a NUL character",
    ]
