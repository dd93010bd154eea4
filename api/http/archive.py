"""A zip as a stream: no disk space, constant memory, and the same bytes for the same files."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator

from qlora_service.artifacts.manifest import ManifestFile

# The earliest time that a zip can store. A constant, because the time of packing would change the bytes.
EPOCH = (1980, 1, 1, 0, 0, 0)
REGULAR_FILE = 0o100644 << 16


def stream_zip(files: Iterable[ManifestFile], read: Callable[[str], Iterator[bytes]]) -> Iterator[bytes]:
    """The bytes of a zip of `files`, uncompressed because weights do not compress.

    `read` returns the chunks of a file by its name; it is called once per file, in order.
    """
    buffer = _WriteBuffer()
    with zipfile.ZipFile(buffer, "w") as archive:
        for file in files:
            entry = zipfile.ZipInfo(file.name, EPOCH)
            entry.external_attr = REGULAR_FILE
            entry.file_size = file.bytes  # above 2 GiB, it makes the entry a zip64 entry
            with archive.open(entry, "w") as target:
                for chunk in read(file.name):
                    target.write(chunk)
                    yield buffer.take()
    yield buffer.take()


class _WriteBuffer:
    """The part of the file interface that ZipFile needs to write without seeking."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def write(self, data: bytes, /) -> int:
        self._pending += data
        return len(data)

    def flush(self) -> None:
        """Does nothing: there is no file below."""

    def close(self) -> None:
        """Does nothing: there is no file below."""

    def take(self) -> bytes:
        """Returns the bytes written since the last call, and empties the buffer."""
        data = bytes(self._pending)
        self._pending.clear()
        return data
