"""Uploads in parts, which become datasets: begin, add parts, complete, cancel; expired ones are removed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from sqlalchemy.engine import Connection

from qlora_service.actions.dataset_storage import DatasetStorage
from qlora_service.artifacts.manifest import describe_file
from qlora_service.artifacts.store import ArtifactStore, part_key
from qlora_service.domain.clock import Clock
from qlora_service.domain.datasets import Dataset
from qlora_service.domain.ids import new_id
from qlora_service.domain.uploads import Part, Upload, UploadStatus
from qlora_service.errors import Conflict, InvalidRequest, TooLarge
from qlora_service.store import uploads as rows
from qlora_service.store.database import Database
from qlora_service.store.idempotency import Once, recall, write_once

UPLOAD_LIFETIME = timedelta(hours=1)
"""How long an upload accepts parts, as in the hosted API"""


@dataclass(frozen=True)
class ClosedUpload:
    """A completed or cancelled upload, and the dataset that a completed one became."""

    upload: Upload
    dataset: Dataset | None = None


class Uploads:
    """The uploads of one project. Parts are in the artifact store, so they survive a restart of the API."""

    def __init__(
        self, database: Database, artifacts: ArtifactStore, storage: DatasetStorage, project: str, clock: Clock
    ) -> None:
        self._database = database
        self._artifacts = artifacts
        self._storage = storage
        self._project = project
        self._clock = clock

    def begin(
        self, *, filename: str, size: int, purpose: str, mime_type: str, once: Once[Upload] | None = None
    ) -> Upload:
        """An upload that accepts parts of `size` bytes in total for an hour.

        Raises:
            StorageFull: the project would store more than it may.
        """
        self.reap()
        now = self._clock()
        upload = Upload(
            id=new_id("upload"),
            project=self._project,
            status=UploadStatus.PENDING,
            filename=filename,
            purpose=purpose,
            mime_type=mime_type,
            bytes=size,
            dataset_id=None,
            created_at=now,
            expires_at=now + UPLOAD_LIFETIME,
        )

        def insert(connection: Connection) -> Upload:
            rows.insert_upload(connection, upload)
            self._storage.check_room(connection)
            return upload

        return write_once(self._database, once, self._clock(), insert)

    def add_part(self, upload_id: str, path: Path, *, once: Once[Part] | None = None) -> Part:
        """A part with the bytes of the file at `path`.

        Raises:
            NotFound: no such upload.
            Conflict: the upload is closed or expired.
            TooLarge: the parts exceed the announced size.
        """
        recall(self._database, once)
        with self._database.read() as connection:
            self._pending(connection, upload_id)
        file = describe_file(path)
        part = Part(new_id("part"), upload_id, file.bytes, file.sha256, self._clock())
        self._artifacts.put_file(part_key(upload_id, part.id), path)

        def insert(connection: Connection) -> Part:
            upload = self._pending(connection, upload_id, lock=True)
            size = part.bytes + sum(other.bytes for other in rows.list_parts(connection, upload_id))
            if size > upload.bytes:
                raise TooLarge(
                    f"upload {upload_id} was announced with {upload.bytes} bytes, and with this part it would have "
                    f"{size}: begin another upload with the file's size",
                    location="data",
                    max_bytes=upload.bytes,
                )
            rows.insert_part(connection, part)
            return part

        try:
            return write_once(self._database, once, self._clock(), insert)
        except BaseException:
            self._artifacts.remove(part_key(upload_id, part.id))
            raise

    def complete(
        self, upload_id: str, part_ids: Sequence[str], md5: str | None = None, *, once: Once[ClosedUpload] | None = None
    ) -> ClosedUpload:
        """The upload, and the dataset made of its parts in the order of `part_ids`.

        Raises:
            NotFound: no such upload.
            Conflict: the upload is closed or expired.
            InvalidRequest: a part belongs to another upload, or size or MD5 differ from the announced ones.
            InvalidDataset: no row of the file is usable.
        """
        recall(self._database, once)
        with self._database.read() as connection:
            upload = self._pending(connection, upload_id)
            parts = _chosen(rows.list_parts(connection, upload_id), part_ids, upload)
        with self._storage.scratch() as scratch:
            path = scratch / "joined"
            self._join(parts, path, md5)
            # The upload's announced size counted towards the quota when it was begun.
            insert_dataset = self._storage.store_file(path, upload.filename, room_is_reserved=True)

            def close(connection: Connection) -> ClosedUpload:
                self._pending(connection, upload_id, lock=True)
                dataset = insert_dataset(connection)
                rows.close_upload(connection, upload_id, UploadStatus.COMPLETED, dataset.id)
                return ClosedUpload(rows.get_upload(connection, upload_id, project=self._project), dataset)

            closed = write_once(self._database, once, self._clock(), close)
        self._discard(upload_id)
        return closed

    def cancel(self, upload_id: str, *, once: Once[ClosedUpload] | None = None) -> ClosedUpload:
        """The cancelled upload; its parts are deleted. Cancelling again changes nothing. Raises: NotFound, Conflict."""

        def close(connection: Connection) -> ClosedUpload:
            upload = rows.get_upload(connection, upload_id, project=self._project, lock=True)
            if upload.status is not UploadStatus.CANCELLED:
                self._pending(connection, upload_id)
                rows.close_upload(connection, upload_id, UploadStatus.CANCELLED)
            return ClosedUpload(rows.get_upload(connection, upload_id, project=self._project))

        cancelled = write_once(self._database, once, self._clock(), close)
        self._discard(upload_id)
        return cancelled

    def reap(self) -> None:
        """Deletes the parts of closed and expired uploads, of every project."""
        with self._database.write() as connection:
            closed = rows.expire_uploads(connection, self._clock())
        for upload_id in closed:
            self._discard(upload_id)

    def _pending(self, connection: Connection, upload_id: str, *, lock: bool = False) -> Upload:
        """The upload, if it accepts parts. Raises: NotFound, Conflict."""
        upload = rows.get_upload(connection, upload_id, project=self._project, lock=lock)
        expired = upload.expires_at < self._clock()
        if upload.status is not UploadStatus.PENDING or expired:
            status = UploadStatus.EXPIRED if upload.status is UploadStatus.PENDING else upload.status
            raise Conflict(f"upload {upload_id} is {status}: begin another one", location="upload_id")
        return upload

    def _join(self, parts: Sequence[Part], path: Path, md5: str | None) -> None:
        """Writes the concatenated parts to `path`. Raises: InvalidRequest."""
        digest = hashlib.md5(usedforsecurity=False)
        with path.open("wb") as file:
            for part in parts:
                for chunk in self._artifacts.read(part_key(part.upload_id, part.id)):
                    digest.update(chunk)
                    file.write(chunk)
        if md5 is not None and md5.lower() != digest.hexdigest():
            raise InvalidRequest(
                f"the parts have the MD5 {digest.hexdigest()}, not {md5}: name them in the file's order, "
                "and send damaged parts again",
                location="md5",
            )

    def _discard(self, upload_id: str) -> None:
        """Deletes the parts of a closed upload; rows last, so that `reap` finds them after a crash."""
        self._artifacts.remove_upload(upload_id)
        with self._database.write() as connection:
            rows.delete_parts(connection, upload_id)


def _chosen(parts: Sequence[Part], wanted: Sequence[str], upload: Upload) -> list[Part]:
    """The parts in the order of `wanted`. Raises: InvalidRequest, when they are not the whole file."""
    known = {part.id: part for part in parts}
    unknown = [part_id for part_id in wanted if part_id not in known]
    if unknown or len(set(wanted)) < len(wanted):
        why = f"has no part {unknown[0]!r}" if unknown else "cannot use a part twice"
        raise InvalidRequest(f"upload {upload.id} {why}: name its parts in the file's order", location="part_ids")
    chosen = [known[part_id] for part_id in wanted]
    size = sum(part.bytes for part in chosen)
    if size != upload.bytes:
        raise InvalidRequest(
            f"the parts named have {size} bytes, the upload was announced with {upload.bytes}: add and name the "
            "missing parts, or begin another upload with the right size",
            location="part_ids",
        )
    return chosen
