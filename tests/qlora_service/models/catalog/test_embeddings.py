"""The number of embeddings of stored models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_service.models.catalog.catalog import Catalog
from qlora_service.models.catalog.embeddings import embedding_rows
from tests.unknown_tokens import build_model_with_unknown_tokens


def test_rows_are_those_of_the_stored_embedding(tmp_path: Path) -> None:
    source = tmp_path / "source"
    rows = build_model_with_unknown_tokens(source)
    model = Catalog(tmp_path / "models").import_model("tiny", source)
    assert embedding_rows(model) == rows
    assert embedding_rows(replace(model, vocab_size=7)) == rows


@pytest.mark.parametrize(
    ("name", "rows"), [("transformer.wte.weight", 9), ("model.embed_tokens.weight", 9), ("lm_head.weight", 7)]
)
def test_config_counts_where_no_embedding_is_known(tiny_model: Path, tmp_path: Path, name: str, rows: int) -> None:
    model = Catalog(tmp_path / "models").import_model("tiny", tiny_model)
    save_file({name: torch.zeros(9, 2)}, model.path / "model.safetensors")
    assert embedding_rows(replace(model, vocab_size=7)) == rows
