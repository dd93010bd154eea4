"""Configs that transformers cannot load, and models that are not causal."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qlora_service.errors import InvalidModel
from qlora_service.models.catalog import causality
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.models.catalog.causality import causality_findings

BERT = {
    "model_type": "bert", "architectures": ["BertLMHeadModel"], "vocab_size": 30522, "hidden_size": 768,
    "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512,
}  # fmt: skip
GEMMA = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
NEMOTRON = {"model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"]}


def findings(config: dict[str, Any]) -> list[str]:
    return causality_findings(json.dumps(config).encode())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BERT, "it is not causal: the predictions of BertLMHeadModel change with later tokens"),
        (GEMMA | {"use_bidirectional_attention": True}, "it is not causal"),
        (BERT | {"model_type": "roberta", "is_decoder": True}, "does not count positions from 0"),
        (BERT | {"model_type": "t5"}, "has the model type t5, which transformers"),
        (BERT | {"model_type": "nonsense"}, "has the model type nonsense, which transformers"),
        (BERT | {"hidden_size": [768]}, "cannot read config.json: Validation error for field 'hidden_size'"),
    ],
    ids=["encoder", "switched to both directions", "positions", "another kind of model", "unknown type", "invalid"],
)
def test_config_is_refused_in_words(config: dict[str, Any], words: str) -> None:
    (finding,) = findings(config)
    assert words in finding


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_model_that_needs_further_packages_is_refused_with_their_names() -> None:
    (finding,) = findings({"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"]})
    assert "only with packages that are not installed here: " in finding
    assert "timm" in finding


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [BERT | {"is_decoder": True}, NEMOTRON | {"time_step_limit": [0.0, {"__float__": "Infinity"}]}],
    ids=["decoder", "infinity"],
)
def test_causal_model_is_accepted(config: dict[str, Any]) -> None:
    assert findings(config) == []


def test_routine_type_is_not_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causality, "LIMIT_S", 0.0)
    assert findings({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}) == []


def test_model_that_cannot_be_examined_in_time_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causality, "LIMIT_S", 0.01)
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(["sleep", "1"], timeout=causality.LIMIT_S, check=False)
    assert findings(BERT | {"hidden_size": 512}) == []


@pytest.mark.slow
def test_encoder_is_refused_before_its_files_are_copied(tmp_path: Path, model_directory: Path) -> None:
    config = json.loads((model_directory / "config.json").read_bytes())
    (model_directory / "config.json").write_text(json.dumps(config | BERT))
    catalog = Catalog(tmp_path / "models")
    with pytest.raises(InvalidModel, match=r"it is not causal.*choose a decoder.*or set is_decoder to true"):
        catalog.import_model("bert", model_directory)
    assert catalog.list() == []
    assert list(catalog.models_dir.iterdir()) == []
