"""A sample of `make families`: one family of each kind that needs more than a Llama does, and one of each refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.workspace import ROOT

CERTIFIED = {
    "axk2": "an indexer without a gradient",
    "gemma3": "a vision tower that rows of text do not reach",
    "gemma3n_text": "linear layers whose weight is read directly",
    "kimi_linear": "another name of the longest sequence",
    "trocr": "a decoder that ignores logits_to_keep",
}
REFUSED = {"mamba": "it is a Mamba model", "roberta": "it is not causal"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The sweep's outcomes by model type."""
    output = tmp_path_factory.mktemp("families") / "families.json"
    command = [sys.executable, "-m", "tests.families", "--output", str(output), *CERTIFIED, *REFUSED]
    result = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    return {outcome["model_type"]: outcome for outcome in json.loads(output.read_bytes())["families"]}


@pytest.mark.parametrize("model_type", CERTIFIED, ids=CERTIFIED.get)
def test_family_is_trained_and_certified(families: dict[str, dict[str, Any]], model_type: str) -> None:
    outcome = families[model_type]
    before, after = outcome["held_out"]
    assert outcome["result"] == "certified"
    assert after < before


@pytest.mark.parametrize(("model_type", "words"), REFUSED.items())
def test_family_is_refused_at_import_in_words(families: dict[str, dict[str, Any]], model_type: str, words: str) -> None:
    assert families[model_type]["result"] == "refused at import"
    assert words in families[model_type]["reason"]
