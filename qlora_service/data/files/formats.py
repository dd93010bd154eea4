"""Containers: an uploaded file as a stream of raw rows, each with its place in the file, in constant memory.

What is wrong with one row is a finding in its place; what is wrong with the file is `InvalidDataset`.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from qlora_service.data.files import splitting
from qlora_service.data.json.fast import BLANKS, parse_row
from qlora_service.data.json.strict import RowProblem, check_strings, parse_json
from qlora_service.data.rows.examples import Container
from qlora_service.data.rows.shapes import COLUMNS, JSON_COLUMNS, detect_shape
from qlora_service.errors import Finding, InvalidDataset

_EXTENSIONS: dict[str, Container] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
_TITLES: dict[Container, str] = {
    "jsonl": "JSON Lines",
    "json": "a JSON array",
    "csv": "CSV",
    "parquet": "Parquet",
    "text": "plain text",
}
_PARQUET_MAGIC = b"PAR1"
# First bytes of files that end up here by mistake.
_FOREIGN = (
    (b"PK\x03\x04", "a ZIP archive (or an Office document)"),
    (b"\x1f\x8b", "gzip-compressed"),
    (b"\x28\xb5\x2f\xfd", "Zstandard-compressed"),
    (b"BZh91AY", "bzip2-compressed"),
    (b"\xfd7zXZ\x00", "xz-compressed"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"%PDF-", "a PDF document"),
    (b"ARROW1", "an Arrow IPC file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
)
_HEAD_BYTES = 64 * 2**10
_CONTROL_BYTES = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))
_DELIMITERS = (",", ";", "\t")
# Few rows at a time: a Parquet page decodes to many times its size on disk.
_PARQUET_BATCH_ROWS = 16
_ACCEPTED = "Accepted are JSON Lines, a JSON array, CSV, Parquet and plain text, uncompressed, in UTF-8"

_OBJECT_START = re.compile(rb'\{\s*(?:["}]|$)')
_ARRAY_START = re.compile(rb'\[\s*(?:[\[{"\]]|$)')
_OBJECT_LINE = re.compile(rb"^[ \t]*\{", re.MULTILINE)
_LIST_UNDER_KEY = re.compile(rb'\{\s*"([^"\\]*)"\s*:\s*\[\s*(?:\{|$)')


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it stands in the file: its `value`, or the `finding` that says why it could not be read.

    `line` and `byte_offset` are those of `errors.Finding`.
    """

    value: dict[str, Any] | None
    line: int
    byte_offset: int | None
    finding: Finding | None = None


def detect_container(path: Path, filename: str | None = None) -> Container:
    """The container of a file, told by its content; its name decides only between CSV and plain text.

    Raises:
        InvalidDataset: the file is empty, of no accepted kind, or not what its name says. JSON Lines and a
            JSON array are told apart for sure, and either may be called .json or .jsonl.
    """
    name = PurePath(filename or path.name).name
    claimed = _EXTENSIONS.get(PurePath(name).suffix.lower())
    with path.open("rb") as file:
        head = _head(file, name)
        seems = _foreign(head)
        if seems is not None:
            raise InvalidDataset(f"{name!r} seems to be {seems}. {_ACCEPTED}")
        found = _by_content(head, claimed)
        if found == "jsonl":
            file.seek(0)
            _refuse_one_object(file, head, name)
    if claimed in (None, found) or {claimed, found} == {"json", "jsonl"}:
        return found
    raise InvalidDataset(
        f"{name!r} seems to be {_TITLES[found]}, not {_TITLES[claimed]} as its name says: "
        "name it for what it holds, or state its container"
    )


def _head(file: BinaryIO, name: str) -> bytes:
    """The file's first bytes from the first that is not blank."""
    while chunk := file.read(_HEAD_BYTES):
        if body := chunk.removeprefix(splitting.UTF8_BOM).lstrip(BLANKS):
            return body + file.read(_HEAD_BYTES - len(body))
    raise InvalidDataset(f"{name!r} is empty. {_ACCEPTED}")


def _foreign(head: bytes) -> str | None:
    """What the file is if it is neither Parquet nor text."""
    for magic, title in _FOREIGN:
        if head.startswith(magic):
            return title
    controls = len(head) - len(head.translate(None, _CONTROL_BYTES))
    # A stray NUL in a JSON row is that row's finding; UTF-16 is NULs by the half.
    if not head.startswith(_PARQUET_MAGIC) and controls > len(head) // (10 if head[:1] in b"{[" else 100):
        return "binary data (or UTF-16 text)"
    return None


def _by_content(head: bytes, claimed: Container | None) -> Container:
    if head.startswith(_PARQUET_MAGIC):
        return "parquet"
    is_json_by_name = claimed in ("json", "jsonl")
    if _OBJECT_START.match(head) or (is_json_by_name and _OBJECT_LINE.search(head) and head[:1] != b"["):
        return "jsonl"
    if _ARRAY_START.match(head) or (is_json_by_name and head[:1] == b"["):
        return "json"
    if claimed in ("csv", "text"):
        return claimed
    _, header = _csv_header(head)
    has_columns = detect_shape(dict.fromkeys(header)) is not None
    return "csv" if has_columns or (claimed is not None and len(header) > 1) else "text"


def _refuse_one_object(file: BinaryIO, head: bytes, name: str) -> None:
    """Refuse `{"data": [rows]}`, which as JSON Lines would be one useless row, or many broken ones."""
    first = next(line for line in splitting.lines(file) if not line.is_blank)
    under = _LIST_UNDER_KEY.match(head)
    key = under.group(1).decode(errors="replace") if under else None
    try:
        value = parse_json(_decode(first))
    except RowProblem:
        value = None
    if isinstance(value, dict):
        key = next((key for key in value if len(value) == 1 and isinstance(value[key], list)), None)
    if key is not None and key not in COLUMNS:
        raise InvalidDataset(f"{name!r} is one JSON object with its rows under {key[:60]!r}: upload that list itself")
    if first.raw.strip() == b"{":
        raise InvalidDataset(
            f"{name!r} has JSON objects that span lines: put each on a line of its own, or all in one array"
        )


def _csv_header(head: bytes) -> tuple[str, list[str]]:
    """The delimiter that cuts the header into most columns, and these columns."""
    text = head.lstrip(b"\r\n").decode(errors="replace")
    headers: dict[str, list[str]] = {}
    for delimiter in _DELIMITERS:
        try:
            header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), [])
        except csv.Error:
            header = []
        headers[delimiter] = [column.strip() for column in header]
    return max(headers.items(), key=lambda item: len(item[1]))


def read_rows(path: Path, container: Container) -> Iterator[RawRow]:
    """Every row of the file in file order, readable or not; blank lines are no rows.

    Raises:
        InvalidDataset: the file as a whole is not of this container, found before or while reading.
    """
    return _READERS[container](path)


def _row(line: int, offset: int | None, problem: str | None, read: Callable[[], dict[str, Any]]) -> RawRow:
    """The row that `read` gives, unless there already is a problem with its bytes."""
    try:
        if problem is not None:
            raise RowProblem("", problem)
        return RawRow(read(), line, offset)
    except RowProblem as found:
        return RawRow(None, line, offset, Finding(found.reason, found.pointer, line, offset))


def _decode(piece: splitting.Piece) -> str:
    try:
        return piece.raw.decode()
    except UnicodeDecodeError as error:
        raise RowProblem("", splitting.invalid_utf8(error, piece.offset)) from None


def json_row(piece: splitting.Piece) -> RawRow:
    """The row whose JSON text the piece is."""
    return _row(piece.line, piece.offset, piece.problem, partial(_json_value, piece))


def _json_value(piece: splitting.Piece) -> dict[str, Any]:
    value = parse_row(piece.raw)
    if value is None:
        value = parse_json(_decode(piece))
    if not isinstance(value, dict):
        raise RowProblem("", "a row must be a JSON object")
    return value


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as file:
        yield from (json_row(line) for line in splitting.lines(file) if not line.is_blank)


def _read_json(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        body = head.removeprefix(splitting.UTF8_BOM).lstrip(BLANKS)
        if not body.startswith(b"["):
            raise InvalidDataset(
                "the file is not a JSON array: it must begin with [ and hold one object per row. "
                'Upload rows under a key ({"data": [...]}) without it, and one object per line as JSON Lines'
            )
        yield from map(json_row, splitting.array_elements(file, len(head) - len(body) + 1))


def _read_text(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as file:
        for document in splitting.documents(file):
            yield _row(document.line, document.offset, document.problem, partial(_text_value, document))


def _text_value(document: splitting.Piece) -> dict[str, Any]:
    if b"\0" in document.raw:
        raise RowProblem("", "contains a NUL character")
    return {"text": _decode(document).replace("\r\n", "\n").rstrip("\n")}


def _read_csv(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as file:
        delimiter, _ = _csv_header(file.read(_HEAD_BYTES).removeprefix(splitting.UTF8_BOM))
        file.seek(0)
        records = splitting.csv_records(file, delimiter)
        columns = _columns(next(records, None))
        for record in records:
            read = partial(_csv_value, columns, record.fields)
            yield _row(record.line, record.offset, record.problem, read)


def _columns(header: splitting.Record | None) -> list[str]:
    if header is None:
        raise InvalidDataset("the CSV file is empty: its first row must name the columns")
    if header.problem is not None:
        raise InvalidDataset(f"the header row of the CSV file cannot be read: {header.problem}")
    return _distinct([column.strip() for column in header.fields])


def _distinct(columns: list[str]) -> list[str]:
    for column, count in Counter(filter(None, columns)).items():
        if count > 1:
            raise InvalidDataset(f"the file has two columns named {column[:60]!r}: rename one")
    return columns


def _csv_value(columns: list[str], fields: list[str]) -> dict[str, Any]:
    if len(fields) != len(columns):
        raise RowProblem("", f"has {len(fields)} columns where the header has {len(columns)}")
    value: dict[str, Any] = {}
    for column, field in zip(columns, fields, strict=True):
        if column in JSON_COLUMNS:
            value[column] = parse_json(field, f"/{column}") if field.strip() else None
        elif column:  # pandas writes its index under an empty name
            value[column] = field
    return value


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    line = 0
    with path.open("rb") as file:
        try:
            table = pq.ParquetFile(file, buffer_size=2**20)
            names = _distinct(table.schema_arrow.names)
            wanted = [name for name in names if name in COLUMNS]
            # Columns that no shape reads may be of any type and size: only their names matter.
            others = dict.fromkeys(name for name in names if name not in COLUMNS)
            for batch in table.iter_batches(_PARQUET_BATCH_ROWS, columns=wanted, use_threads=False):
                for index in range(batch.num_rows):
                    line += 1
                    yield _row(line, None, None, partial(_parquet_value, batch, index, others))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InvalidDataset(f"the Parquet file is damaged after row {line}: {error}") from error


def _parquet_value(batch: Any, index: int, others: dict[str, Any]) -> dict[str, Any]:
    try:
        value: dict[str, Any] = batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError:  # Parquet does not promise that its strings are UTF-8
        raise RowProblem("", "a string is not valid UTF-8") from None
    if check_strings(value) > splitting.MAX_ROW_BYTES:
        raise RowProblem("", splitting.TOO_LONG)
    return others | value


_READERS: dict[Container, Callable[[Path], Iterator[RawRow]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "text": _read_text,
}
