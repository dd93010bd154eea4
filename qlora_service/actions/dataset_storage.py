"""A dataset's bytes in the artifact store and its row in the database, written so that a crash orphans neither."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.engine import Connection

from qlora_service.artifacts.manifest import describe_file
from qlora_service.artifacts.store import ArtifactStore, dataset_key
from qlora_service.data.files.checks import check_dataset
from qlora_service.domain.clock import Clock
from qlora_service.domain.datasets import Dataset
from qlora_service.domain.ids import new_id
from qlora_service.errors import NotFound
from qlora_service.specs import Container, Shape
from qlora_service.store import datasets as dataset_rows
from qlora_service.store.database import Database
from qlora_service.store.storage import check_room


class DatasetStorage:
    """The datasets of one project on disk and in the database."""

    def __init__(
        self,
        database: Database,
        artifacts: ArtifactStore,
        tmp_dir: Path,
        project: str,
        clock: Clock,
        *,
        max_stored_bytes: int | None,
    ) -> None:
        """`max_stored_bytes` bounds what one project stores; None for no bound."""
        self._database = database
        self._artifacts = artifacts
        self._tmp_dir = tmp_dir
        self._project = project
        self._clock = clock
        self._max_stored_bytes = max_stored_bytes

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A temporary directory on the data disk."""
        with tempfile.TemporaryDirectory(dir=self._tmp_dir) as path:
            yield Path(path)

    def check(self, path: Path, filename: str | None, container: Container | None, shape: Shape | None) -> Dataset:
        """The dataset made of the file at `path`, not stored yet.

        Raises:
            InvalidDataset: the container cannot be detected or read, or no row is usable.
        """
        report = check_dataset(path, filename=filename, container=container, shape=shape)
        return Dataset(new_id("ds"), self._project, describe_file(path).sha256, filename, self._clock(), report)

    def store_file(
        self,
        path: Path,
        filename: str | None,
        container: Container | None = None,
        shape: Shape | None = None,
        *,
        room_is_reserved: bool = False,
    ) -> Callable[[Connection], Dataset]:
        """Checks the file and stores its bytes; the returned function inserts the row and returns the stored dataset.

        `room_is_reserved` says that these bytes count towards the quota already.

        Raises:
            InvalidDataset: as `check` does.
            StorageFull: the project would store more than it may.
        """
        dataset = self.check(path, filename, container, shape)
        if not room_is_reserved:
            self.check_room_for(dataset)
        self.store_bytes(dataset, path)

        def insert(connection: Connection) -> Dataset:
            stored = self.insert(connection, dataset, path)
            if not room_is_reserved:
                self.check_room(connection)
            return stored

        return insert

    def check_room_for(self, dataset: Dataset) -> None:
        """Refuses, before its bytes are written, a dataset that `check_room` would refuse. Raises: StorageFull."""
        if not self._artifacts.exists(dataset_key(dataset.sha256)):
            with self._database.read() as connection:
                self.check_room(connection, dataset.report.bytes)

    def check_room(self, connection: Connection, more_bytes: int = 0) -> None:
        """Raises: StorageFull: with `more_bytes` the project would store more than it may."""
        check_room(connection, self._project, self._max_stored_bytes, more_bytes=more_bytes)

    def store_bytes(self, dataset: Dataset, path: Path) -> None:
        # Overwrites an existing key: after a power cut it may hold a torn file that was never flushed.
        self._artifacts.put_file(dataset_key(dataset.sha256), path)

    def insert(self, connection: Connection, dataset: Dataset, path: Path) -> Dataset:
        """The stored dataset, whose bytes are those of the file at `path`."""
        stored = dataset_rows.insert_dataset(connection, dataset)
        dataset_rows.lock_bytes(connection, dataset.sha256)
        if not self._artifacts.exists(dataset_key(dataset.sha256)):
            # Another dataset with the same bytes was deleted after `store_bytes`.
            self.store_bytes(dataset, path)
        return stored

    def local_copy(self, dataset: Dataset, scratch: Path) -> Path:
        """A local file with the dataset's bytes; `scratch` takes a copy where the store is remote."""
        return self._artifacts.local_copy(dataset_key(dataset.sha256), scratch)

    def find(self, connection: Connection, dataset_id: str, location: str, *, lock: bool = False) -> Dataset:
        """The dataset that a spec names at `location`. Raises: NotFound."""
        try:
            return dataset_rows.get_dataset(connection, dataset_id, project=self._project, lock=lock)
        except NotFound as error:
            error.location = location
            raise
