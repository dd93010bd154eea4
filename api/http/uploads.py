"""Request bodies: files are written to the data disk in constant memory and deleted when the request ends."""

from __future__ import annotations

import re
import tempfile
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from api.http.multipart import Form, FormWriter, boundary_of
from qlora_service.errors import TooLarge

# Limit of a body kept in memory: a JSON document, with inline rows.
MAX_JSON_BYTES = 32 * 2**20
# Bytes per disk write. Writes run in a thread: a handover for each network packet would cost more than the write.
WRITE_BYTES = 2**20
# Width of the column datasets.filename.
MAX_FILENAME_CHARS = 255

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")


class Uploads:
    """Receives bodies of up to `max_bytes` into `directory`."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes

    @asynccontextmanager
    async def receive_file(self, request: Request) -> AsyncIterator[Path]:
        """A file with the whole body, while the context lasts.

        Raises:
            TooLarge: the body is over the limit.
        """
        with tempfile.TemporaryDirectory(dir=self._directory) as scratch:
            path = Path(scratch) / "body"
            with path.open("wb") as file:
                await _receive(request, file.write, self._max_bytes)
            yield path

    @asynccontextmanager
    async def receive_form(
        self, request: Request, *, files: Collection[str], fields: Collection[str]
    ) -> AsyncIterator[Form]:
        """The parts of a multipart body; the parts named in `files` are on disk while the context lasts.

        Raises:
            InvalidRequest: not a complete multipart body, an unknown part, or a part sent twice.
            TooLarge: the body is over the limit, or a field over MAX_JSON_BYTES.
        """
        boundary = boundary_of(request.headers.get("content-type", ""))
        with tempfile.TemporaryDirectory(dir=self._directory) as scratch:
            writer = FormWriter(boundary, Path(scratch), files, fields, MAX_JSON_BYTES)
            with writer:
                await _receive(request, writer.write, self._max_bytes)
                yield writer.finish()


async def receive_bytes(request: Request, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The whole body in memory. Raises: TooLarge."""
    body = bytearray()
    await _receive(request, body.extend, max_bytes)
    return bytes(body)


def display_name(filename: str | None) -> str | None:
    """The label of an upload: the last component of the file name that the client sent, without control characters."""
    if filename is None:
        return None
    return _UNPRINTABLE.sub("", re.split(r"[/\\]", filename)[-1])[-MAX_FILENAME_CHARS:] or None


async def _receive(request: Request, write: Callable[[bytes], object], max_bytes: int) -> None:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    received, pending = 0, bytearray()
    async for packet in request.stream():
        received += len(packet)
        if received > max_bytes:
            raise _too_large(max_bytes)
        pending += packet
        if len(pending) >= WRITE_BYTES:
            await run_in_threadpool(write, bytes(pending))
            pending.clear()
    await run_in_threadpool(write, bytes(pending))


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(
        f"the request's body is larger than the limit of {max_bytes} bytes: split the file, or upload it to "
        "POST /datasets, where QLORA_MAX_UPLOAD_BYTES is the limit",
        max_bytes=max_bytes,
    )
