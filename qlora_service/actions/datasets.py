"""Datasets: upload, list, read, delete; their token lengths and previews under a base model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Connection

from qlora_service.actions.dataset_storage import DatasetStorage
from qlora_service.actions.rendering import Rendering
from qlora_service.artifacts.store import ArtifactStore, dataset_key
from qlora_service.data.rendering.renderer import RenderRules
from qlora_service.data.rendering.report import RenderReport
from qlora_service.domain.clock import Clock
from qlora_service.domain.datasets import Dataset
from qlora_service.errors import Conflict
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.specs import Container, Shape
from qlora_service.store import datasets as dataset_rows
from qlora_service.store import jobs as job_rows
from qlora_service.store.database import Database
from qlora_service.store.idempotency import Once, recall, write_once
from qlora_service.store.pages import PageRequest


class Datasets:
    """The datasets of one project."""

    def __init__(
        self,
        database: Database,
        artifacts: ArtifactStore,
        catalog: Catalog,
        storage: DatasetStorage,
        rendering: Rendering,
        project: str,
        clock: Clock,
    ) -> None:
        self._database = database
        self._artifacts = artifacts
        self._catalog = catalog
        self._storage = storage
        self._rendering = rendering
        self._project = project
        self._clock = clock

    def upload(
        self,
        path: Path,
        *,
        filename: str | None,
        container: Container | None = None,
        shape: Shape | None = None,
        once: Once[Dataset] | None = None,
    ) -> Dataset:
        """The stored dataset made of the file at `path`; nothing is stored when no row is usable.

        Raises:
            InvalidDataset: the container cannot be detected or read, or no row is usable.
            StorageFull: the project would store more than it may.
        """
        recall(self._database, once)
        insert = self._storage.store_file(path, filename, container, shape)
        return write_once(self._database, once, self._clock(), insert)

    def get(self, dataset_id: str) -> Dataset:
        """Raises: NotFound."""
        with self._database.read() as connection:
            return dataset_rows.get_dataset(connection, dataset_id, project=self._project)

    def list_datasets(
        self, *, before: str | None = None, after: str | None = None, oldest_first: bool = False, limit: int = 20
    ) -> list[Dataset]:
        """Datasets whose ids lie between `after` and `before`."""
        with self._database.read() as connection:
            return dataset_rows.list_datasets(
                connection, PageRequest(limit, before, after, oldest_first), project=self._project
            )

    def read(self, dataset: Dataset) -> Iterator[bytes]:
        """The uploaded bytes, in chunks."""
        return self._artifacts.read(dataset_key(dataset.sha256))

    def delete(self, dataset_id: str, *, once: Once[Dataset] | None = None) -> Dataset:
        """The deleted dataset; its bytes are removed unless another dataset has the same.

        Raises:
            NotFound: no such dataset.
            Conflict: a job that has not ended needs it.
        """

        def delete(connection: Connection) -> Dataset:
            dataset = dataset_rows.get_dataset(connection, dataset_id, project=self._project, lock=True)
            needed_by = job_rows.unfinished_on(connection, dataset_id)
            if needed_by is not None:
                raise Conflict(
                    f"dataset {dataset_id} is needed by job {needed_by}, which has not ended: cancel it, or wait",
                    location="dataset_id",
                )
            dataset_rows.mark_deleted(connection, dataset_id, self._clock())
            # Bytes before the commit: a crash in between leaves a dataset to delete again, not orphaned bytes.
            dataset_rows.lock_bytes(connection, dataset.sha256)
            if not dataset_rows.are_bytes_needed(connection, dataset.sha256):
                self._artifacts.remove(dataset_key(dataset.sha256))
            return dataset

        return write_once(self._database, once, self._clock(), delete)

    def lengths(self, dataset_id: str, base_model: str, rules: RenderRules) -> RenderReport:
        """Token counts and unusable rows of a dataset under one base model's tokenizer and template.

        Raises:
            NotFound: no such dataset.
            InvalidModel: unknown base model, or its template cannot be used.
        """
        return self._rendering.stored_report(self.get(dataset_id), self._catalog.get(base_model), rules)

    def preview(
        self, dataset_id: str, base_model: str, rules: RenderRules, *, skip: int = 0, limit: int = 5
    ) -> list[dict[str, Any]]:
        """Rows as they are trained; see `Rendering.preview`. Raises: NotFound, InvalidModel."""
        dataset, model = self.get(dataset_id), self._catalog.get(base_model)
        return self._rendering.preview(dataset, model, rules, skip=skip, limit=limit)
