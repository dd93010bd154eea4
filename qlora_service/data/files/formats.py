"""Containers: an uploaded file as a stream of raw rows, each with its place in the file, in constant memory.

An error in one row is a finding in place of the row; an error of the whole file is `InvalidDataset`.
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
from qlora_service.data.files.arrow_values import Converter, converters
from qlora_service.data.json.fast import JSON_WHITESPACE, parse_row
from qlora_service.data.json.strict import RowProblem, check_strings, parse_json
from qlora_service.data.rows.examples import Container
from qlora_service.data.rows.shapes import COLUMNS, detect_shape
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
# First bytes of file types that users upload by mistake.
_UNSUPPORTED = (
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
# Small batches, because a Parquet page decodes to many times its size on disk.
_PARQUET_BATCH_ROWS = 16
_ACCEPTED = "Accepted formats are JSON Lines, a JSON array, CSV, Parquet and plain text, uncompressed, in UTF-8"

_OBJECT_START = re.compile(rb'\{\s*(?:["}]|$)')
_ARRAY_START = re.compile(rb'\[\s*(?:[\[{"\]]|$)')
_OBJECT_LINE = re.compile(rb"^[ \t]*\{", re.MULTILINE)
_LIST_UNDER_KEY = re.compile(rb'\{\s*"([^"\\]*)"\s*:\s*\[\s*(?:\{|$)')


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of the file: its `value`, or the `finding` why it cannot be read.

    `line` and `byte_offset` are those of `errors.Finding`.
    """

    value: dict[str, Any] | None
    line: int
    byte_offset: int | None
    finding: Finding | None = None


def detect_container(path: Path, filename: str | None = None) -> Container:
    """The container of a file, detected by its content; its name decides only between CSV and plain text.

    Raises:
        InvalidDataset: the file is empty, in no accepted format, or not in the format of its name. JSON Lines and a
            JSON array are always told apart, and both may be named .json or .jsonl.
    """
    name = PurePath(filename or path.name).name
    claimed = _EXTENSIONS.get(PurePath(name).suffix.lower())
    with path.open("rb") as file:
        head = _head(file, name)
        unsupported = _unsupported_format(head)
        if unsupported is not None:
            raise InvalidDataset(f"{name!r} seems to be {unsupported}. {_ACCEPTED}")
        detected = _container_of(head, claimed)
        if detected == "jsonl":
            file.seek(0)
            _refuse_single_object(file, head, name)
    if claimed in (None, detected) or {claimed, detected} == {"json", "jsonl"}:
        return detected
    raise InvalidDataset(
        f"{name!r} seems to be {_TITLES[detected]}, not {_TITLES[claimed]} as its name says: "
        "rename the file to match its content, or state its container"
    )


def read_rows(path: Path, container: Container) -> Iterator[RawRow]:
    """Every row of the file in file order, readable or not; blank lines are not rows.

    Raises:
        InvalidDataset: the file as a whole is not of this container, detected before or during reading.
    """
    return _READERS[container](path)


def json_row(piece: splitting.Piece) -> RawRow:
    """The row whose JSON text is the piece."""
    return _row(piece.line, piece.offset, piece.problem, partial(_json_value, piece))


def _head(file: BinaryIO, name: str) -> bytes:
    """The first bytes of the file, from the first byte that is not white space."""
    while chunk := file.read(_HEAD_BYTES):
        if body := chunk.removeprefix(splitting.UTF8_BOM).lstrip(JSON_WHITESPACE):
            return body + file.read(_HEAD_BYTES - len(body))
    raise InvalidDataset(f"{name!r} is empty. {_ACCEPTED}")


def _unsupported_format(head: bytes) -> str | None:
    """The format of a file that is neither Parquet nor text; None otherwise."""
    for magic, title in _UNSUPPORTED:
        if head.startswith(magic):
            return title
    controls = len(head) - len(head.translate(None, _CONTROL_BYTES))
    # A stray NUL in a JSON row is a finding of that row; half the bytes of UTF-16 text are NULs.
    if not head.startswith(_PARQUET_MAGIC) and controls > len(head) // (10 if head[:1] in b"{[" else 100):
        return "binary data (or UTF-16 text)"
    return None


def _container_of(head: bytes, claimed: Container | None) -> Container:
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


def _refuse_single_object(file: BinaryIO, head: bytes, name: str) -> None:
    """Refuses `{"data": [rows]}`, which as JSON Lines would be one useless row or many invalid rows."""
    first = next(line for line in splitting.lines(file) if not line.is_blank)
    match = _LIST_UNDER_KEY.match(head)
    key = match.group(1).decode(errors="replace") if match else None
    try:
        value = parse_json(_decode(first))
    except RowProblem:
        value = None
    if isinstance(value, dict):
        key = next((key for key in value if len(value) == 1 and isinstance(value[key], list)), None)
    if key is not None and key not in COLUMNS:
        raise InvalidDataset(f"{name!r} is one JSON object with its rows under {key[:60]!r}: upload only that list")
    if first.raw.strip() == b"{":
        raise InvalidDataset(
            f"{name!r} has JSON objects that span lines: put each object on its own line, or all objects in one array"
        )


def _csv_header(head: bytes) -> tuple[str, list[str]]:
    """The delimiter that splits the header into the most columns, and the columns."""
    text = head.lstrip(b"\r\n").decode(errors="replace")
    headers: dict[str, list[str]] = {}
    for delimiter in _DELIMITERS:
        try:
            header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), [])
        except csv.Error:
            header = []
        headers[delimiter] = [column.strip() for column in header]
    return max(headers.items(), key=lambda item: len(item[1]))


def _row(line: int, offset: int | None, problem: str | None, read: Callable[[], dict[str, Any]]) -> RawRow:
    """The row whose value `read` returns; a finding if it raises, or if its bytes have a problem."""
    try:
        if problem is not None:
            raise RowProblem("", problem)
        return RawRow(read(), line, offset)
    except RowProblem as error:
        return RawRow(None, line, offset, Finding(error.reason, error.pointer, line, offset))


def _decode(piece: splitting.Piece) -> str:
    try:
        return piece.raw.decode()
    except UnicodeDecodeError as error:
        raise RowProblem("", splitting.invalid_utf8(error, piece.offset)) from None


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
        body = head.removeprefix(splitting.UTF8_BOM).lstrip(JSON_WHITESPACE)
        if not body.startswith(b"["):
            raise InvalidDataset(
                "the file is not a JSON array: it must begin with [ and hold one object per row. "
                'Upload rows under a key ({"data": [...]}) as the list alone, and one object per line as JSON Lines'
            )
        yield from map(json_row, splitting.array_elements(file, len(head) - len(body) + 1))


def _read_text(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as file:
        for document in splitting.text_documents(file):
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
    """The columns. Raises: InvalidDataset, two columns have the same name."""
    for column, count in Counter(filter(None, columns)).items():
        if count > 1:
            raise InvalidDataset(f"the file has two columns named {column[:60]!r}: rename one")
    return columns


def _csv_value(columns: list[str], fields: list[str]) -> dict[str, Any]:
    if len(fields) != len(columns):
        raise RowProblem("", f"has {len(fields)} columns where the header has {len(columns)}")
    # pandas writes its index in a column without a name.
    return {column: field for column, field in zip(columns, fields, strict=True) if column}


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    line = 0
    with path.open("rb") as file:
        try:
            table = pq.ParquetFile(file, buffer_size=2**20)
            names = _distinct(table.schema_arrow.names)
            used = [name for name in names if name in COLUMNS]
            # Columns that no shape reads can be of any type and size: only their names matter.
            unused = dict.fromkeys(name for name in names if name not in COLUMNS)
            convert = converters(table.schema_arrow)
            for batch in table.iter_batches(_PARQUET_BATCH_ROWS, columns=used, use_threads=False):
                for index in range(batch.num_rows):
                    line += 1
                    yield _row(line, None, None, partial(_parquet_value, batch, index, convert, unused))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InvalidDataset(f"the Parquet file is damaged after row {line}: {error}") from error


def _parquet_value(batch: Any, index: int, convert: dict[str, Converter], unused: dict[str, Any]) -> dict[str, Any]:
    try:
        value: dict[str, Any] = batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError:  # Parquet does not guarantee that its strings are UTF-8
        raise RowProblem("", "a string is not valid UTF-8") from None
    value = {name: convert[name](cell, f"/{name}") if name in convert else cell for name, cell in value.items()}
    if check_strings(value) > splitting.MAX_ROW_BYTES:
        raise RowProblem("", splitting.TOO_LONG)
    return unused | value


_READERS: dict[Container, Callable[[Path], Iterator[RawRow]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "text": _read_text,
}
