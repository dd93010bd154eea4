"""Datasets rendered with a base model's tokenizer and chat template: the report on all rows, and a preview of some."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any

from qlora_service.actions.dataset_storage import DatasetStorage
from qlora_service.data.files.checks import read_examples
from qlora_service.data.rendering.preview import preview_row
from qlora_service.data.rendering.renderer import Renderer, RenderRules, UnusableRow
from qlora_service.data.rendering.report import RenderReport, render_report
from qlora_service.data.rows.examples import SourceRow, Text
from qlora_service.domain.clock import Clock
from qlora_service.domain.datasets import Dataset
from qlora_service.errors import InvalidSpec
from qlora_service.models.catalog.catalog import BaseModel
from qlora_service.models.catalog.embeddings import embedding_rows
from qlora_service.specs import JobSpec
from qlora_service.store import datasets as dataset_rows
from qlora_service.store.database import Database

CHECKED_ROWS = 50_000
"""Rows rendered while a job is posted; the trainer checks the rest before its first step."""
REPORT_FIELDS = [field.name for field in fields(RenderReport)]
"""A stored report with other fields is rendered again."""


class Rendering:
    """Renders the datasets of one project."""

    def __init__(self, database: Database, storage: DatasetStorage, clock: Clock) -> None:
        self._database = database
        self._storage = storage
        self._clock = clock

    def stored_report(self, dataset: Dataset, model: BaseModel, rules: RenderRules) -> RenderReport:
        """The report on a stored dataset, cached by model and rules.

        Raises:
            InvalidModel: the model's tokenizer or chat template cannot be used.
        """
        identity = [model.name, model.weights_sha256, model.imported_at, asdict(rules), CHECKED_ROWS, REPORT_FIELDS]
        key = hashlib.sha256(json.dumps(identity, default=str).encode()).hexdigest()
        with self._database.read() as connection:
            known = dataset_rows.get_render_report(connection, dataset.id, key)
        if known is not None:
            return RenderReport(**known)
        with self._storage.scratch() as scratch:
            report = self.report(dataset, self._storage.local_copy(dataset, scratch), model, rules)
        with self._database.write() as connection:
            dataset_rows.put_render_report(connection, dataset.id, key, asdict(report))
        return report

    def report(self, dataset: Dataset, path: Path, model: BaseModel, rules: RenderRules) -> RenderReport:
        """The report on a dataset whose bytes are at `path`. Raises: InvalidModel."""
        with self._renderer(model, rules) as renderer:
            return render_report(renderer, _examples(dataset, path), CHECKED_ROWS)

    def preview(
        self, dataset: Dataset, model: BaseModel, rules: RenderRules, *, skip: int, limit: int
    ) -> list[dict[str, Any]]:
        """Rows as they are trained, see `data.rendering.preview`."""
        with self._storage.scratch() as scratch, self._renderer(model, rules) as renderer:
            path = self._storage.local_copy(dataset, scratch)
            rows = islice(_examples(dataset, path), skip, skip + limit)
            return [preview_row(renderer, result) for result in renderer.render(rows)]

    def check_questions(self, spec: JobSpec, model: BaseModel) -> None:
        """Raises: InvalidSpec, when a question of the evaluation has a token that the base has no embedding for."""
        questions = [SourceRow(Text(question), 0, None) for question in spec.evaluation.questions]
        if not questions:
            return
        with self._renderer(model, RenderRules.of(spec.training)) as renderer:
            for number, result in enumerate(renderer.render(questions)):
                if isinstance(result, UnusableRow) and result.unknown_token:
                    raise InvalidSpec(result.finding.reason, location=f"/evaluation/questions/{number}")

    def _renderer(self, model: BaseModel, rules: RenderRules) -> Renderer:
        return Renderer(model.path, rules, self._clock(), embeddings=embedding_rows(model))


def _examples(dataset: Dataset, path: Path) -> Iterator[SourceRow]:
    return read_examples(path, dataset.report.container, dataset.report.shape)
