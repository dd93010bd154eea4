"""The artifact store: datasets and adapters by key, through obstore (a local directory; later S3, GCS, Azure)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlparse

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import LocalStore, ObjectStore, from_url

from qlora_service.errors import Conflict, NotFound
from qlora_service.process.fsync import flush

READ_CHUNK_BYTES = 1 << 20


class ArtifactStore:
    """Objects under one URL. The service forms the keys; they never come from a user."""

    def __init__(self, url: str) -> None:
        parsed = urlparse(url)
        self._root: Path | None = None
        self._store: ObjectStore
        if parsed.scheme == "file":
            self._root = Path(unquote(parsed.path))
            self._store = LocalStore(self._root, mkdir=True)
            flush(self._root.parent)  # makes the directory entry durable
        else:
            self._store = from_url(url)

    def put_file(self, key: str, path: Path) -> None:
        """Stores the file under `key`; durable on return."""
        obstore.put(self._store, key, path)
        self._sync(key)

    def create(self, key: str, content: bytes) -> None:
        """Stores `content` under a new key; durable on return.

        Raises:
            Conflict: the key exists.
        """
        try:
            obstore.put(self._store, key, content, mode="create")
        except AlreadyExistsError:
            raise Conflict(f"artifact {key} exists already") from None
        self._sync(key)

    def size(self, key: str) -> int:
        """Raises: NotFound."""
        try:
            return obstore.head(self._store, key)["size"]
        except FileNotFoundError:
            raise NotFound(f"the artifact store has no {key}") from None

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes [start, end) of an object, in chunks of at most READ_CHUNK_BYTES.

        Raises:
            NotFound: no such object; raised before the first chunk.
        """
        size = self.size(key)
        return self._read(key, start, size if end is None else min(end, size))

    def fetch(self, key: str, path: Path) -> None:
        """Copies an object to a local file. Raises: NotFound."""
        chunks = self.read(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.writelines(chunks)

    def local_copy(self, key: str, scratch: Path) -> Path:
        """A read-only local file with the object's bytes: the object itself, or a copy in `scratch`."""
        if self._root is not None:
            self.size(key)
            return self._root / key
        path = scratch / key.rsplit("/", 1)[-1]
        self.fetch(key, path)
        return path

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except NotFound:
            return False
        return True

    def remove(self, key: str) -> None:
        """Removes an object, if it exists."""
        with suppress(FileNotFoundError):
            obstore.delete(self._store, key)

    def remove_upload(self, upload_id: str) -> None:
        """Removes the parts of an upload."""
        prefix = f"uploads/{upload_id}/"
        obstore.delete(self._store, [entry["path"] for page in obstore.list(self._store, prefix) for entry in page])
        if self._root is not None:
            shutil.rmtree(self._root / prefix, ignore_errors=True)

    def remove_attempts(self, job_id: str, keep: int | None) -> None:
        """Removes the artifacts of all attempts at a job except the attempt `keep`, of which only unfinished files go.

        The artifacts of an attempt are kept or removed as a unit.
        """
        prefix = f"jobs/{job_id}/"
        keys = [entry["path"] for page in obstore.list(self._store, prefix) for entry in page]
        obstore.delete(self._store, [key for key in keys if not key.startswith(f"{prefix}{keep}/")])
        if self._root is not None:
            # The local store does not list directories or its unfinished files ("<name>#<number>").
            for directory in (self._root / prefix).glob("*"):
                if directory.name != str(keep):
                    shutil.rmtree(directory, ignore_errors=True)
                for unfinished in directory.glob("*#*"):
                    unfinished.unlink(missing_ok=True)

    def remove_unfinished(self, older_than_s: float) -> None:
        """Removes partial files in the local store, left by processes that were killed during a write."""
        if self._root is None:
            return
        # The local store writes to "<name>#<number>" next to the object, and renames.
        for path in (*self._root.glob("datasets/*#*"), *self._root.glob("uploads/*/*#*")):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > older_than_s:
                    path.unlink()

    def datasets_since(self, stored_at: float, older_than_s: float) -> list[str]:
        """The SHA-256 of datasets in the local store that were stored at or after `stored_at` (Unix time in seconds).

        Only those older than `older_than_s`. Empty for a bucket, because it may be shared with another service.
        """
        hashes = []
        for path in self._root.glob("datasets/*") if self._root is not None else ():
            with suppress(FileNotFoundError):
                modified_at = path.stat().st_mtime
                if "#" not in path.name and stored_at <= modified_at < time.time() - older_than_s:
                    hashes.append(path.name)
        return hashes

    def _read(self, key: str, start: int, end: int) -> Iterator[bytes]:
        while start < end:
            stop = min(start + READ_CHUNK_BYTES, end)
            yield bytes(obstore.get_range(self._store, key, start=start, end=stop))
            start = stop

    def _sync(self, key: str) -> None:
        """Flushes a local object and its directories, because the store renames without fsync."""
        if self._root is None:
            return
        path = self._root / key
        with suppress(FileNotFoundError):  # another process has removed it
            flush(path)
        for directory in path.parents:
            flush(directory)
            if directory == self._root:
                break


def dataset_key(sha256: str) -> str:
    return f"datasets/{sha256}"


def part_key(upload_id: str, part_id: str) -> str:
    return f"uploads/{upload_id}/{part_id}"


def job_key(job_id: str, token: int, name: str) -> str:
    """The key of an artifact of one attempt: a newer attempt never overwrites the files of an older one."""
    return f"jobs/{job_id}/{token}/{name}"
