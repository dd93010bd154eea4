"""Downloads of published files: resumed after a broken connection, and checked against their SHA-256."""

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
    """The paths of the job's files in `directory`, in the order of `files`.

    A file gets its name only when it is complete; until then it is a `.part`, from which a later call resumes.

    Raises:
        InvalidRequest: the directory cannot be created or written, or contains another file with one of the names,
            which is left unchanged.
        Unavailable: a file does not have its SHA-256.
    """
    targets = [directory / _plain_name(file.name) for file in files]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _refuse_to_overwrite(files, targets)
        for file, target in zip(files, targets, strict=True):
            _fetch(transport, job_id, file, target)
    except OSError as error:
        raise InvalidRequest(
            f"{error.filename or directory} cannot be written ({error.strerror}): free disk space, or choose another "
            "directory; the bytes received so far are kept"
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
        # The `.part` belonged to another file: download again from the start.
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
    """Downloads the rest of `part`, with a new connection after each that breaks."""
    backoff = transport.backoff()
    while True:
        size_before = _size(part)
        try:
            return _append(transport, url, file, part)
        except (Unreachable, ServiceError) as error:
            if not transport.is_transient(error):
                raise
            if _size(part) > size_before:
                backoff.reset()
            backoff.pause(error)


def _append(transport: Transport, url: str, file: ArtifactFile, part: Path) -> None:
    """Appends to `part` the bytes that one connection delivers."""
    with part.open("ab") as output:
        start = output.tell()
        if start > file.bytes:
            start = output.truncate(0)
        if start == file.bytes:
            return
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers |= {"Range": f"bytes={start}-", "If-Range": f'"{file.sha256}"'}
        with transport.stream(url, headers) as response:
            if response.status_code != httpx2.codes.PARTIAL_CONTENT:
                output.truncate(0)
            # Written as received: bytes that wait in a buffer are lost when the connection breaks.
            for received in response.iter_raw():
                output.write(received)
        output.flush()
        os.fsync(output.fileno())


def _refuse_to_overwrite(files: Sequence[ArtifactFile], targets: Sequence[Path]) -> None:
    """Raises: InvalidRequest, with the names of existing files that have other bytes."""
    others = [
        file.name
        for file, target in zip(files, targets, strict=True)
        if target.exists() and (target.is_dir() or _sha256(target) != file.sha256)
    ]
    if others:
        raise InvalidRequest(
            f"{targets[0].parent} contains another {', '.join(others)}: download into an empty directory, or remove "
            "these files"
        )


def _plain_name(name: str) -> str:
    """`name`, checked to stay inside its directory. Raises: InvalidRequest."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise InvalidRequest(
            f"the service lists an artifact {name!r}, which is not a plain file name: nothing was written"
        )
    return name


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
