"""multipart/form-data (RFC 7578), parsed as a stream: file parts are written directly to disk."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from qlora_service.errors import InvalidRequest, TooLarge

MEDIA_TYPE = "multipart/form-data"


@dataclass(frozen=True)
class FilePart:
    """An uploaded file, and the file name that the client sent."""

    path: Path
    filename: str | None


@dataclass
class Form:
    """The parts of a multipart body, by name."""

    files: dict[str, FilePart] = field(default_factory=dict)
    fields: dict[str, bytearray] = field(default_factory=dict)

    def text(self, name: str) -> str | None:
        """The text of a field; None if the form has no field of this name. Raises: InvalidRequest."""
        value = self.fields.get(name)
        if value is None:
            return None
        try:
            text = value.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                f"the part {name!r} is not UTF-8: byte 0x{value[error.start]:02x} at offset {error.start}",
                location=name,
            ) from None
        if "\0" in text:
            raise InvalidRequest(f"the part {name!r} contains a NUL character", location=name)
        return text


def is_multipart(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == MEDIA_TYPE


def boundary_of(content_type: str) -> bytes:
    """The boundary between the parts. Raises: InvalidRequest."""
    boundary: bytes | None = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise InvalidRequest("the Content-Type header names no boundary of the parts", location="content-type")
    return boundary


class FormWriter:
    """Parses a body piece by piece.

    The name of a part decides whether it is a file (`files`) or a field (`fields`), not the headers of the client.
    """

    def __init__(
        self,
        boundary: bytes,
        directory: Path,
        files: Collection[str],
        fields: Collection[str],
        max_field_bytes: int,
    ) -> None:
        self._directory = directory
        self._file_names = files
        self._field_names = fields
        self._max_field_bytes = max_field_bytes
        self._form = Form()
        self._header_name, self._header_value = bytearray(), bytearray()
        self._disposition = b""
        self._name = ""
        self._file: BinaryIO | None = None
        self._complete = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._add_header_name,
                    "on_header_value": self._add_header_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._open_part,
                    "on_part_data": self._add_data,
                    "on_part_end": self._close_file,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise _malformed(str(error)) from None

    def __enter__(self) -> FormWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_file()

    def write(self, data: bytes) -> None:
        """Raises: InvalidRequest, TooLarge."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _malformed(str(error)) from None

    def finish(self) -> Form:
        """The form, after the whole body was written. Raises: InvalidRequest."""
        if not self._complete:
            raise _malformed("it ends before its last boundary")
        return self._form

    def _begin_part(self) -> None:
        self._disposition = b""

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _open_part(self) -> None:
        options = parse_options_header(self._disposition)[1]
        name = options.get(b"name", b"").decode(errors="replace")
        if name not in self._file_names and name not in self._field_names:
            expected = ", ".join([*self._file_names, *self._field_names])
            raise InvalidRequest(f"unknown part {name[:60]!r}: this form has the parts {expected}", location=name[:60])
        if name in self._form.files or name in self._form.fields:
            raise InvalidRequest(f"the part {name!r} is sent twice: send it once", location=name)
        self._name = name
        if name in self._file_names:
            filename = options.get(b"filename")
            decoded = None if filename is None else filename.decode(errors="replace")
            part = FilePart(self._directory / name, decoded)
            self._form.files[name] = part
            self._file = part.path.open("wb")
        else:
            self._form.fields[name] = bytearray()

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(memoryview(data)[start:end])
            return
        value = self._form.fields[self._name]
        value += data[start:end]
        if len(value) > self._max_field_bytes:
            raise TooLarge(
                f"the part {self._name!r} is larger than {self._max_field_bytes} bytes: send rows as a file",
                location=self._name,
                max_bytes=self._max_field_bytes,
            )

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _end(self) -> None:
        self._complete = True


def _malformed(reason: str) -> InvalidRequest:
    return InvalidRequest(f"the multipart body cannot be read: {reason}")
