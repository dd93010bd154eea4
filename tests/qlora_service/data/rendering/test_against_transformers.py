"""A sample of `python -m tests.benchmarks rendering`: text, ids and masks against transformers and TRL's marks."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.benchmarks._rendering import families
from tests.benchmarks._rendering.comparison import Comparison, Outcome, compare
from tests.benchmarks._rendering.conversations import conversations
from tests.benchmarks._rendering.marked_templates import marked_template
from tests.benchmarks._rendering.reference import Family, NotRendered

SAMPLE = [
    "several turns",
    "weight 0, same answers",
    "call, null content",
    "call with words",
    "last turn is two calls",
    "nested arguments as text",
    "thoughts in reasoning",
    "inline thoughts",
    "thoughts with calls in several turns",
    "emoji",
]
# Families that rewrite earlier turns, and one for each way of writing calls and ends of turns.
FAMILIES = [
    "deepseekv3",
    "gemma3",
    "gemma4_v5",
    "glm4moe",
    "gptoss",
    "llama3_1",
    "muse_glimmer",
    "nemotron_3_nano",
    "phi3",
    "qwen2_5",
    "qwen3",
    "qwen3_5_think",
]
DIFFERENT = (Outcome.OTHER_IDS, Outcome.REFUSED, Outcome.UNEXPLAINED, Outcome.NO_MARKS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return families.train_tokenizer()


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_equal_those_of_transformers_and_the_mask_equals_the_marks(
    name: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    family = Family(name, families.build_model(name, tmp_path / name, tokenizer))
    rows = conversations()
    comparisons = list(compare(family, {kind: rows[kind] for kind in SAMPLE}))
    assert [shown(it) for it in comparisons if it.outcome in DIFFERENT] == []
    assert [it.kind for it in comparisons if it.copy_agrees is False] == []


@pytest.mark.parametrize("name", [name for name in families.names() if marked_template(name)])
def test_marked_copy_renders_what_the_template_of_the_family_renders(
    name: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    family = Family(name, families.build_model(name, tmp_path / name, tokenizer))
    rendered = 0
    for kind in SAMPLE:
        try:
            reference = family.reference(family.as_sent(conversations()[kind]))
        except NotRendered:
            continue
        rendered += 1
        assert reference.own is not None, kind
        assert reference.copy_agrees in (True, None), kind
    assert rendered > 0


def shown(comparison: Comparison) -> str:
    return f"{comparison.kind}: {comparison.outcome}\n{comparison.detail}"
