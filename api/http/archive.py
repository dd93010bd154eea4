"""A zip as a stream: nothing is held on disk or in memory, and the same files give the same bytes."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator

from qlora_service.artifacts.manifest import ManifestFile

# The earliest time a zip can hold: when a file was packed is no part of what it is.
EPOCH = (1980, 1, 1, 0, 0, 0)
REGULAR_FILE = 0o100644 << 16


class _Outbox:
    """What a ZipFile needs of a file that cannot seek; `take` empties it."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def write(self, data: bytes, /) -> int:
        self._pending += data
        return len(data)

    def flush(self) -> None:
        """Nothing waits below."""

    def close(self) -> None:
        """Nothing was opened."""

    def take(self) -> bytes:
        data = bytes(self._pending)
        self._pending.clear()
        return data


def stream_zip(files: Iterable[ManifestFile], read: Callable[[str], Iterator[bytes]]) -> Iterator[bytes]:
    """The bytes of an uncompressed zip of `files`; weights do not compress.

    `read` gives a file's bytes by its name, and is called when its turn comes.
    """
    outbox = _Outbox()
    with zipfile.ZipFile(outbox, "w") as archive:
        for file in files:
            entry = zipfile.ZipInfo(file.name, EPOCH)
            entry.external_attr = REGULAR_FILE
            entry.file_size = file.bytes  # above 2 GiB it makes the entry a zip64 one
            with archive.open(entry, "w") as target:
                for chunk in read(file.name):
                    target.write(chunk)
                    yield outbox.take()
    yield outbox.take()
