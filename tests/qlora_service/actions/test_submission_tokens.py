"""Jobs whose rows or questions have tokens that the base has no embedding for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_service.actions.service import Service
from qlora_service.data.rendering.renderer import RenderRules
from qlora_service.errors import InvalidDataset, InvalidSpec
from qlora_service.models.catalog.catalog import Catalog
from tests.qlora_service.actions._submissions import ROWS, submit
from tests.unknown_tokens import build_model_with_unknown_tokens

WITH_TICKET = {"prompt": "Where is <|ticket|>?", "completion": "In the hall."}


@pytest.fixture(scope="module")
def embeddings(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Rows of the embedding of the base `unknown`, which has two more tokens."""
    source = tmp_path_factory.mktemp("source") / "model"
    rows = build_model_with_unknown_tokens(source)
    catalog.import_model("unknown", source)
    return rows


def test_one_row_with_such_a_token_refuses_the_job(service: Service, embeddings: int) -> None:
    with pytest.raises(InvalidDataset) as caught:
        submit(service, base_model="unknown", dataset={"rows": [*ROWS, WITH_TICKET]})
    assert caught.value.location == "/dataset"
    assert caught.value.message.startswith(
        "1 of 21 rows of the dataset have tokens that unknown has no embedding for: line 21: it has token "
        f"{embeddings} (<|ticket|>), and the base has embeddings for {embeddings} tokens (0 to {embeddings - 1}): "
        "resize "
    )
    assert caught.value.findings[0].line == 21


@pytest.mark.usefixtures("embeddings")
def test_rows_without_such_a_token_are_trained(service: Service) -> None:
    assert submit(service, base_model="unknown", dataset={"rows": ROWS}).job.warnings == []


@pytest.mark.usefixtures("embeddings")
def test_validation_rows_are_checked(service: Service, upload: Callable[..., Path]) -> None:
    validation = service.datasets.upload(upload([WITH_TICKET]), filename=None)
    with pytest.raises(InvalidDataset, match="1 of 1 rows") as caught:
        submit(service, base_model="unknown", dataset={"rows": ROWS}, validation={"dataset_id": validation.id})
    assert caught.value.location == "/validation/dataset_id"


@pytest.mark.usefixtures("embeddings")
def test_questions_of_the_evaluation_are_checked(service: Service) -> None:
    evaluation: dict[str, Any] = {"questions": ["Where is the hall?", "Where is <|seat|>?"]}
    with pytest.raises(InvalidSpec, match=r"<\|seat\|>") as caught:
        submit(service, base_model="unknown", dataset={"rows": ROWS}, evaluation=evaluation)
    assert caught.value.location == "/evaluation/questions/1"


@pytest.mark.usefixtures("embeddings")
def test_preview_shows_the_problem(service: Service, upload: Callable[..., Path]) -> None:
    dataset = service.datasets.upload(upload([WITH_TICKET]), filename=None)
    (row,) = service.datasets.preview(dataset.id, "unknown", RenderRules(128), skip=0, limit=1)
    assert "(<|ticket|>)" in row["problem"]
