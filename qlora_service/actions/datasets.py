"""What a user can do with datasets and base models: the first half of `service.Service`."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.engine import Connection

from qlora_service.actions.uploads import PartUploads
from qlora_service.artifacts.manifest import describe_file
from qlora_service.artifacts.store import ArtifactStore, dataset_key
from qlora_service.data.files.checks import check_dataset, read_examples
from qlora_service.data.rendering.renderer import (
    RenderedRow,
    Renderer,
    RenderReport,
    RenderRules,
    UnusableRow,
    render_report,
)
from qlora_service.data.rows.examples import Container, Shape, SourceRow
from qlora_service.domain.datasets import Dataset
from qlora_service.domain.ids import new_id
from qlora_service.errors import Conflict
from qlora_service.models.catalog.catalog import BaseModel, Catalog
from qlora_service.store import datasets as dataset_rows
from qlora_service.store import idempotency, storage
from qlora_service.store import jobs as job_rows
from qlora_service.store.database import Database
from qlora_service.store.idempotency import Once

CHECKED_ROWS = 50_000
"""Rows rendered while a job is posted; the trainer checks the rest before it starts."""

Result = TypeVar("Result")


class DatasetActions:
    """The actions of one project that need no queue. What belongs to another project is not there."""

    def __init__(
        self,
        *,
        database: Database,
        artifacts: ArtifactStore,
        catalog: Catalog,
        tmp_dir: Path,
        clock: Callable[[], datetime],
        max_stored_bytes: int | None,
        project: str,
    ) -> None:
        """`max_stored_bytes` is how much of one project is kept."""
        self._database = database
        self._artifacts = artifacts
        self._catalog = catalog
        self._tmp_dir = tmp_dir
        self._clock = clock
        self._max_stored_bytes = max_stored_bytes
        self._project = project
        tmp_dir.mkdir(parents=True, exist_ok=True)

    # --- datasets

    def add_dataset(
        self,
        path: Path,
        *,
        filename: str | None,
        container: Container | None = None,
        shape: Shape | None = None,
        once: Once[Dataset] | None = None,
    ) -> Dataset:
        """The stored dataset made of the file at `path`; nothing is stored when no row of it is usable.

        Raises:
            InvalidDataset: the container cannot be told or read, or no row is usable.
        """
        self._recall(once)
        return self._write(once, self._prepared(path, filename, container, shape))

    def get_dataset(self, dataset_id: str) -> Dataset:
        """Raises: NotFound."""
        with self._database.read() as connection:
            return dataset_rows.get_dataset(connection, dataset_id, project=self._project)

    def list_datasets(
        self, *, before: str | None = None, after: str | None = None, oldest_first: bool = False, limit: int = 20
    ) -> list[Dataset]:
        """Datasets whose ids lie between the two given."""
        with self._database.read() as connection:
            return dataset_rows.list_datasets(
                connection, project=self._project, before=before, after=after, oldest_first=oldest_first, limit=limit
            )

    def read_dataset(self, dataset: Dataset) -> Iterator[bytes]:
        """The bytes that were uploaded, in chunks."""
        return self._artifacts.read(dataset_key(dataset.sha256))

    def delete_dataset(self, dataset_id: str, *, once: Once[Dataset] | None = None) -> Dataset:
        """The dataset, which nobody finds any more; its bytes are gone unless another dataset has the same.

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
            # Before the commit: a crash in between leaves a dataset that can be deleted again, never bytes without one.
            dataset_rows.lock_bytes(connection, dataset.sha256)
            if not dataset_rows.are_bytes_needed(connection, dataset.sha256):
                self._artifacts.remove(dataset_key(dataset.sha256))
            return dataset

        return self._write(once, delete)

    @property
    def uploads(self) -> PartUploads:
        """The project's uploads in parts, which become datasets."""
        return PartUploads(
            database=self._database,
            artifacts=self._artifacts,
            tmp_dir=self._tmp_dir,
            project=self._project,
            clock=self._clock,
            check_room=self._check_room,
            prepare=partial(self._prepared, has_room=True),
        )

    def dataset_lengths(self, dataset_id: str, base_model: str, rules: RenderRules) -> RenderReport:
        """Token counts and unusable rows of a dataset under one base model's tokenizer and template.

        Raises:
            NotFound: no such dataset.
            InvalidModel: unknown base model, or its template cannot be used.
        """
        dataset, model = self.get_dataset(dataset_id), self._catalog.get(base_model)
        with self._scratch() as scratch:
            return self._render_report(dataset, self._local(dataset, scratch), model, rules, keep=True)

    def preview(
        self, dataset_id: str, base_model: str, rules: RenderRules, *, skip: int = 0, limit: int = 5
    ) -> list[dict[str, Any]]:
        """Rows as they will be trained: text, tokens with id, text and whether trained, tokens cut off."""
        dataset, model = self.get_dataset(dataset_id), self._catalog.get(base_model)
        with self._scratch() as scratch, Renderer(model.path, rules, self._clock()) as renderer:
            rows = islice(_examples(dataset, self._local(dataset, scratch)), skip, skip + limit)
            return [_preview(renderer, result) for result in renderer.render(rows)]

    # --- base models

    def list_models(self) -> list[BaseModel]:
        return self._catalog.list()

    def get_model(self, name: str) -> BaseModel:
        """Raises: InvalidModel."""
        return self._catalog.get(name)

    # --- inside

    def _write(self, once: Once[Result] | None, action: Callable[[Connection], Result]) -> Result:
        """What `action` returns; its writes and the key's answer are one transaction. Raises: Replay, Conflict."""
        with self._database.write() as connection:
            return idempotency.write_once(connection, once, self._clock(), action)

    def _recall(self, once: Once[Any] | None) -> None:
        """Spares a request that was answered before the work ahead of its `_write`. Raises: Replay, Conflict."""
        if once is not None:
            with self._database.read() as connection:
                idempotency.recall(connection, once)

    def _checked(self, path: Path, filename: str | None, container: Container | None, shape: Shape | None) -> Dataset:
        """A dataset that is not stored yet. Raises: InvalidDataset."""
        report = check_dataset(path, filename=filename, container=container, shape=shape)
        return Dataset(new_id("ds"), self._project, describe_file(path).sha256, filename, self._clock(), report)

    def _prepared(
        self,
        path: Path,
        filename: str | None,
        container: Container | None = None,
        shape: Shape | None = None,
        *,
        has_room: bool = False,
    ) -> Callable[[Connection], Dataset]:
        """Checks the file and stores its bytes; what it returns adds the row, and gives the stored dataset.

        Raises:
            StorageFull: unless what these bytes are was counted before: then it `has_room`.
        """
        dataset = self._checked(path, filename, container, shape)
        if not has_room:
            self._check_room_for(dataset)
        self._store_bytes(dataset, path)

        def insert(connection: Connection) -> Dataset:
            stored = self._insert_dataset(connection, dataset, path)
            if not has_room:
                self._check_room(connection)
            return stored

        return insert

    def _check_room_for(self, dataset: Dataset) -> None:
        """Spares the disk what `_check_room` would refuse. Raises: StorageFull."""
        if not self._artifacts.exists(dataset_key(dataset.sha256)):
            with self._database.read() as connection:
                self._check_room(connection, dataset.report.bytes)

    def _check_room(self, connection: Connection, more_bytes: int = 0) -> None:
        """Raises: StorageFull: the project keeps too much, be it only with `more_bytes`."""
        storage.check_room(connection, self._project, self._max_stored_bytes, more_bytes=more_bytes)

    def _insert_dataset(self, connection: Connection, dataset: Dataset, path: Path) -> Dataset:
        """The stored dataset, whose bytes are those of the file at `path`."""
        stored = dataset_rows.insert_dataset(connection, dataset)
        dataset_rows.lock_bytes(connection, dataset.sha256)
        if not self._artifacts.exists(dataset_key(dataset.sha256)):
            # Another dataset with these bytes was deleted after they were stored for this one.
            self._store_bytes(dataset, path)
        return stored

    def _store_bytes(self, dataset: Dataset, path: Path) -> None:
        # Also when the key is there: after a power cut a file that was never flushed may be there, but torn.
        self._artifacts.put_file(dataset_key(dataset.sha256), path)

    def _local(self, dataset: Dataset, scratch: Path) -> Path:
        return self._artifacts.local_copy(dataset_key(dataset.sha256), scratch)

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self._tmp_dir) as path:
            yield Path(path)

    def _render_report(
        self, dataset: Dataset, path: Path, model: BaseModel, rules: RenderRules, *, keep: bool
    ) -> RenderReport:
        """What rendering the dataset gives; with `keep` from the cache and into it."""
        identity = [model.name, model.weights_sha256, model.imported_at, asdict(rules), CHECKED_ROWS]
        key = hashlib.sha256(json.dumps(identity, default=str).encode()).hexdigest()
        if keep:
            with self._database.read() as connection:
                known = dataset_rows.get_render_report(connection, dataset.id, key)
            if known is not None:
                return RenderReport(**known)
        with Renderer(model.path, rules, self._clock()) as renderer:
            report = render_report(renderer, _examples(dataset, path), CHECKED_ROWS)
        if keep:
            with self._database.write() as connection:
                dataset_rows.put_render_report(connection, dataset.id, key, asdict(report))
        return report


def _examples(dataset: Dataset, path: Path) -> Iterator[SourceRow]:
    return read_examples(path, dataset.report.container, dataset.report.shape)


def _preview(renderer: Renderer, result: RenderedRow | UnusableRow) -> dict[str, Any]:
    if isinstance(result, UnusableRow):
        return {"line": result.finding.line, "problem": result.finding.reason}
    rejected = None if result.rejected is None else _preview_document(renderer, result.rejected)
    shown = _preview_document(renderer, result)
    return {"line": result.line, **shown, "rejected": rejected, "desirable": result.desirable}


def _preview_document(renderer: Renderer, document: RenderedRow) -> dict[str, Any]:
    tokens = [
        {"id": token_id, "text": renderer.token_text(token_id), "trained": trained}
        for token_id, trained in zip(document.input_ids, document.trained, strict=True)
    ]
    return {"text": document.text, "tokens": tokens, "cut_tokens": document.cut_tokens}
