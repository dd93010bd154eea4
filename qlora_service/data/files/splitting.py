"""Splitting of a file's bytes into rows, in constant memory, each row with its line and byte offset.

The rows are only split here; `formats` parses them.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from qlora_service.data.json.fast import JSON_WHITESPACE

# No model's context holds a row of this size; the limit keeps memory constant.
MAX_ROW_BYTES = 16 * 2**20
UTF8_BOM = b"\xef\xbb\xbf"

_CHUNK_BYTES = 256 * 2**10
# About forty ordinary rows: an unusable row slows down the check of only few others, and larger blocks gain nothing.
_BLOCK_BYTES = 8 * 2**10
TOO_LONG = f"longer than {MAX_ROW_BYTES // 2**20} MiB: split it into shorter rows"
_CUT_SHORT = "the array ends inside this row: the file is cut short, or a bracket or quote is not closed"
_NOT_CLOSED = "the array ends without its closing bracket: the file is cut short"
_TRAILING = "there is text after the closing bracket of the array: remove it, or use JSON Lines"

# Runs of bytes that cannot change where an element ends: in a string, inside an element, between elements.
_IN_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_IN_ELEMENT = re.compile(rb'[^"\[\]{}]*+')
_IN_ARRAY = re.compile(rb'[^"\[\]{},]*+')


class Piece(NamedTuple):
    """The bytes of one row, or of a block of lines; or the `problem` why there are none."""

    line: int
    offset: int
    raw: bytes
    problem: str | None = None

    @property
    def is_blank(self) -> bool:
        return self.problem is None and not self.raw.strip(JSON_WHITESPACE)


class Record(NamedTuple):
    """The fields of one CSV record, or the `problem` why there are none."""

    line: int
    offset: int
    fields: list[str]
    problem: str | None = None


def invalid_utf8(error: UnicodeDecodeError, offset: int) -> str:
    """The finding's reason for the bytes at `offset` of the file."""
    byte = error.object[error.start]
    place = f"byte 0x{byte:02x} at offset {offset + error.start} of the file"
    return f"{place} is not valid UTF-8: save the file as UTF-8"


def lines(file: BinaryIO) -> Iterator[Piece]:
    """The physical lines with their line ends, blank lines included, without a byte order mark."""
    for block in line_blocks(file):
        yield from lines_of(block)


def line_blocks(file: BinaryIO) -> Iterator[Piece]:
    """The same lines, several in a piece, so that the cost per piece is paid once a block. A long line is a block."""
    offset = len(UTF8_BOM) if file.read(len(UTF8_BOM)) == UTF8_BOM else 0
    file.seek(offset)
    number = 1
    while block := file.read(_BLOCK_BYTES):
        whole_lines = block[: block.rfind(b"\n") + 1]
        file.seek(offset + len(whole_lines))
        yield Piece(number, offset, whole_lines) if whole_lines else _one_line(file, number, offset)
        number += whole_lines.count(b"\n") or 1
        offset = file.tell()


def lines_of(block: Piece) -> Iterator[Piece]:
    """The lines of a block."""
    if block.problem is not None:
        yield block
        return
    offset = block.offset
    for number, raw in enumerate(io.BytesIO(block.raw), start=block.line):
        yield Piece(number, offset, raw)
        offset += len(raw)


def text_documents(file: BinaryIO) -> Iterator[Piece]:
    """The documents of a plain text file: runs of lines between blank lines."""
    for is_blank, run in itertools.groupby(lines(file), key=lambda line: line.is_blank):
        if is_blank:
            continue
        first = next(run)
        buffer = _RowBuffer(first.offset)
        for line in itertools.chain([first], run):
            buffer.add(line.raw, too_long=line.problem is not None)
        yield buffer.piece(first.line)


def array_elements(file: BinaryIO, start: int) -> Iterator[Piece]:
    """The elements of the JSON array whose first byte after `[` is at `start`; `line` counts elements.

    An element ends at a comma outside strings and brackets, even if it is invalid: one bad row stays one row.
    """
    file.seek(start)
    chunk_offset, depth, in_string, escaped = start, 0, False, 0
    line, element = 1, _RowBuffer(start)
    while chunk := file.read(_CHUNK_BYTES):
        position, begin, escaped = escaped, 0, 0
        while position < len(chunk):
            run = _IN_STRING if in_string else _IN_ELEMENT if depth else _IN_ARRAY
            position = _end(run, chunk, position) + 1
            stop = chunk[position - 1 : position]
            if stop == b'"':
                in_string = not in_string
            elif stop == b"\\":  # only at the end of the chunk: the escaped byte begins the next chunk
                escaped = 1
            elif stop in (b"[", b"{"):
                depth += 1
            elif depth and stop:
                depth -= 1
            elif stop in (b",", b"]"):
                element.add_unindented(chunk[begin : position - 1])
                if stop == b"," or line > 1 or element.size:
                    yield element.piece(line)
                    line += 1
                if stop == b"]":
                    yield from _after_array(file, line, chunk_offset + position)
                    return
                begin, element = position, _RowBuffer(chunk_offset + position)
        element.add_unindented(chunk[begin:])
        chunk_offset += len(chunk)
    yield from _unclosed(element.piece(line), is_complete=depth == 0 and not in_string)


def csv_records(file: BinaryIO, delimiter: str) -> Iterator[Record]:
    """The records, including the header; the place of a record that spans lines is its first line."""
    # The csv module's own limit is 128 KiB for the whole process; `_RecordLines` enforces the limit of a row.
    csv.field_size_limit(MAX_ROW_BYTES)
    source = _RecordLines(lines(file))
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    while True:
        source.begin_record()
        fields: list[str] = []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            source.problem = source.problem or f"not valid CSV: {error}"
        if source.problem is not None:
            yield Record(*source.place, [], source.problem)
        elif fields:  # a blank line is not a record
            yield Record(*source.place, fields)


def _one_line(file: BinaryIO, number: int, offset: int) -> Piece:
    raw = file.readline(MAX_ROW_BYTES + 2)
    if len(raw) <= MAX_ROW_BYTES or len(raw.rstrip(b"\r\n")) <= MAX_ROW_BYTES:
        return Piece(number, offset, raw)
    while raw and not raw.endswith(b"\n"):
        raw = file.readline(_CHUNK_BYTES)
    return Piece(number, offset, b"", TOO_LONG)


class _RowBuffer:
    """Collects the bytes of one row, and drops them once the row is longer than `MAX_ROW_BYTES`."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.size = 0
        self._parts: list[bytes] = []

    def add(self, part: bytes, *, too_long: bool = False) -> None:
        self.size += MAX_ROW_BYTES + 1 if too_long else len(part)
        if self.size <= MAX_ROW_BYTES:
            self._parts.append(part)
        else:
            self._parts.clear()

    def add_unindented(self, part: bytes) -> None:
        """As `add`, without the white space before the first byte of the row."""
        body = part if self.size else part.lstrip(JSON_WHITESPACE)
        self.offset += len(part) - len(body)
        self.add(body)

    def piece(self, line: int) -> Piece:
        if self.size > MAX_ROW_BYTES:
            return Piece(line, self.offset, b"", TOO_LONG)
        return Piece(line, self.offset, b"".join(self._parts))


def _end(run: re.Pattern[bytes], chunk: bytes, position: int) -> int:
    match = run.match(chunk, position)
    assert match is not None  # every run may be empty
    return match.end()


def _after_array(file: BinaryIO, line: int, offset: int) -> Iterator[Piece]:
    """The problem of text after the closing bracket, if there is any."""
    file.seek(offset)
    while chunk := file.read(_CHUNK_BYTES):
        if body := chunk.lstrip(JSON_WHITESPACE):
            yield Piece(line, offset + len(chunk) - len(body), b"", _TRAILING)
            return
        offset += len(chunk)


def _unclosed(last: Piece, *, is_complete: bool) -> Iterator[Piece]:
    """The last pieces of an array without a closing bracket."""
    if last.problem is None and is_complete and last.raw.rstrip(JSON_WHITESPACE).endswith(b"}"):
        yield last
        yield Piece(last.line + 1, last.offset + len(last.raw), b"", _NOT_CLOSED)
    else:
        yield last._replace(raw=b"", problem=_CUT_SHORT if last.raw or last.problem else _NOT_CLOSED)


class _RecordLines:
    """The lines that `csv.reader` reads for one record, with the place and the problem of the record."""

    def __init__(self, source: Iterator[Piece]) -> None:
        self._source = source
        self.begin_record()

    def begin_record(self) -> None:
        self.place = (0, 0)
        self.problem: str | None = None
        self._size = 0

    def __iter__(self) -> _RecordLines:
        return self

    def __next__(self) -> str:
        line = next(self._source)
        if not self._size:
            self.place = (line.line, line.offset)
        self._size += len(line.raw)
        if line.problem is not None or self._size > MAX_ROW_BYTES:
            self.problem = TOO_LONG
            raise csv.Error(TOO_LONG)
        if b"\0" in line.raw:
            self.problem = "contains a NUL character"
        try:
            return line.raw.decode()
        except UnicodeDecodeError as error:
            self.problem = invalid_utf8(error, line.offset)
            # Quotes and delimiters are ASCII, so the record still ends in the right place.
            return line.raw.decode(errors="replace")
