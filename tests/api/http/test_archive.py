from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator

from api.http.archive import stream_zip
from qlora_service.artifacts.manifest import ManifestFile

CONTENT = {"weights.bin": b"w" * 1000, "ü.txt": b"", "config.json": b"{}"}


def files() -> list[ManifestFile]:
    return [ManifestFile(name=name, bytes=len(content), sha256="") for name, content in CONTENT.items()]


def read(name: str) -> Iterator[bytes]:
    content = CONTENT[name]
    return (content[start : start + 300] for start in range(0, len(content), 300))


def test_zip_contains_the_files_and_has_the_same_bytes_each_time() -> None:
    first = b"".join(stream_zip(files(), read))
    with zipfile.ZipFile(io.BytesIO(first)) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == CONTENT
        assert {entry.date_time[0] for entry in archive.infolist()} == {1980}
    assert b"".join(stream_zip(files(), read)) == first


def test_file_over_two_gibibytes_gets_a_zip64_header() -> None:
    huge = ManifestFile(name="huge", bytes=5 * 2**30, sha256="")
    first_chunk = next(stream_zip([huge], lambda name: iter([b"x"])))
    version_needed = int.from_bytes(first_chunk[4:6], "little")
    assert version_needed == 45
