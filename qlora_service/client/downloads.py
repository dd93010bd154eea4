"""Published files, brought whole: resumed where the connection broke, and checked against their SHA-256."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import httpx2

from qlora_service.client.transport import Transport
from qlora_service.client.wire import ArtifactFile, ServiceError, Unreachable
from qlora_service.errors import InvalidRequest, Unavailable


def fetch_files(transport: Transport, job_id: str, files: Sequence[ArtifactFile], directory: Path) -> list[Path]:
    """The job's files, now in `directory`, in their order.

    A file appears under its name only when it is whole; until then it is a `.part`, from which a later call goes on.

    Raises:
        InvalidRequest: the directory cannot be made or written, or holds another file of such a name, which is left
            alone.
        Unavailable: a file is not what its SHA-256 says.
    """
    targets = [directory / _plain_name(file.name) for file in files]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _refuse_to_overwrite(files, targets)
        for file, target in zip(files, targets, strict=True):
            _fetch(transport, job_id, file, target)
    except OSError as error:
        raise InvalidRequest(
            f"{error.filename or directory} cannot be written ({error.strerror}): make room, or choose another "
            "directory; what has arrived is kept"
        ) from error
    return targets


def _fetch(transport: Transport, job_id: str, file: ArtifactFile, target: Path) -> None:
    if target.is_file() and _sha256(target) == file.sha256:
        return
    url = f"/jobs/{quote(job_id, safe='')}/artifacts/{quote(file.name)}"
    part = target.with_name(target.name + ".part")
    resumed = part.exists()
    _complete(transport, url, file, part)
    if resumed and _sha256(part) != file.sha256:
        # The part was of another file: once more, from the start.
        part.unlink()
        _complete(transport, url, file, part)
    if (digest := _sha256(part)) != file.sha256:
        part.unlink()
        raise Unavailable(
            f"{file.name} of job {job_id} arrived with SHA-256 {digest}, not {file.sha256}: download it again; "
            "if that does not help, the stored file is damaged"
        )
    part.replace(target)


def _complete(transport: Transport, url: str, file: ArtifactFile, part: Path) -> None:
    """Brings `part` to its full length, over as many connections as it takes."""
    backoff = transport.backoff()
    while True:
        before = _size(part)
        try:
            return _append(transport, url, file, part)
        except (Unreachable, ServiceError) as error:
            if not transport.may_pass(error):
                raise
            if _size(part) > before:
                backoff.reset()
            backoff.pause(error)


def _append(transport: Transport, url: str, file: ArtifactFile, part: Path) -> None:
    """What one connection brings, added to `part`."""
    with part.open("ab") as opened:
        start = opened.tell()
        if start > file.bytes:
            start = opened.truncate(0)
        if start == file.bytes:
            return
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers |= {"Range": f"bytes={start}-", "If-Range": f'"{file.sha256}"'}
        with transport.stream(url, headers) as response:
            if response.status_code != httpx2.codes.PARTIAL_CONTENT:
                opened.truncate(0)
            # As it arrives: what waits for a chunk to fill up would be lost with the connection.
            for received in response.iter_raw():
                opened.write(received)
        opened.flush()
        os.fsync(opened.fileno())


def _refuse_to_overwrite(files: Sequence[ArtifactFile], targets: Sequence[Path]) -> None:
    """Raises: InvalidRequest, naming files that are there with other bytes."""
    others = [
        file.name
        for file, target in zip(files, targets, strict=True)
        if target.exists() and (target.is_dir() or _sha256(target) != file.sha256)
    ]
    if others:
        raise InvalidRequest(
            f"{targets[0].parent} holds another {', '.join(others)}: download into an empty directory, or remove what "
            "is there"
        )


def _plain_name(name: str) -> str:
    """`name`, which must not lead out of a directory. Raises: InvalidRequest."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise InvalidRequest(f"the service names an artifact {name!r}, which is no plain file name: nothing is written")
    return name


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
