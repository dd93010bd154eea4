from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from qlora_service.actions.service import Service
from qlora_service.data.rendering.renderer import RenderRules
from qlora_service.errors import InvalidModel, NotFound
from qlora_service.store.database import Database
from qlora_service.store.tables import render_reports
from tests.qlora_service.actions._submissions import LONG, ROWS


def test_lengths_are_rendered_once_and_then_cached(
    service: Service, upload: Callable[..., Path], database: Database
) -> None:
    dataset = service.datasets.upload(upload([*ROWS, LONG]), filename=None)
    report = service.datasets.lengths(dataset.id, "tiny", RenderRules(128))
    assert (report.rows, report.usable_rows, report.too_long_rows, report.complete) == (21, 20, 1, True)
    assert sum(report.histogram.values()) == 21
    assert report.findings[0]["line"] == 21
    assert service.datasets.lengths(dataset.id, "tiny", RenderRules(128)) == report
    # A changed value in the cache shows that it is read; other rules have another entry.
    with database.write() as connection:
        marked = {**connection.execute(sa.select(render_reports.c.report)).scalar_one(), "rows": 999}
        connection.execute(sa.update(render_reports).values(report=marked))
    assert service.datasets.lengths(dataset.id, "tiny", RenderRules(128)).rows == 999
    assert service.datasets.lengths(dataset.id, "tiny", RenderRules(127)).rows == 21


def test_preview_shows_tokens_and_loss_mask(service: Service, upload: Callable[..., Path]) -> None:
    dataset = service.datasets.upload(upload([*ROWS, LONG]), filename=None)
    first, second = service.datasets.preview(dataset.id, "tiny", RenderRules(128), skip=3, limit=2)
    assert (first["line"], second["line"]) == (4, 5)
    assert first["text"] == ("<|im_start|>user\nWhat is 3 + 3? <|im_end|>\n<|im_start|>assistant\nIt is 6.<|im_end|>\n")
    assert "".join(token["text"] for token in first["tokens"] if token["trained"]) == "It is 6.<|im_end|>"
    (too_long,) = service.datasets.preview(dataset.id, "tiny", RenderRules(128), skip=20)
    assert too_long["line"] == 21
    assert "max_seq_len_tokens is 128" in too_long["problem"]


@pytest.mark.parametrize("action", ["lengths", "preview"])
def test_unknown_dataset_or_model_is_named(service: Service, upload: Callable[..., Path], action: str) -> None:
    dataset = service.datasets.upload(upload(ROWS), filename=None)
    with pytest.raises(NotFound, match="ds_none"):
        getattr(service.datasets, action)("ds_none", "tiny", RenderRules(128))
    with pytest.raises(InvalidModel, match="did you mean 'tiny'"):
        getattr(service.datasets, action)(dataset.id, "tinny", RenderRules(128))
