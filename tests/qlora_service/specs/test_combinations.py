"""Contradictions between parts of a spec, by the location of each finding."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_service.errors import InvalidSpec
from qlora_service.specs import parse_spec

NOTHING_HELD_OUT = {"fraction": 0}
NOTHING_HELD_OUT_REASON = "no rows are held out: set validation.fraction above 0"


@pytest.mark.parametrize(
    ("groups", "findings"),
    [
        (
            {"training": {"loraplus_lr_ratio": 16}, "adapter": {"method": "vera"}},
            {"/training/loraplus_lr_ratio": "vera has no B matrix"},
        ),
        *(
            (
                {"training": {"neftune_noise_alpha": 5}, "adapter": {"method": method}},
                {"/training/neftune_noise_alpha": f"does not reach the input that {method} builds"},
            )
            for method in ("prompt_tuning", "prefix_tuning", "p_tuning")
        ),
        (
            {"training": {"gradient_checkpointing": True}, "adapter": {"method": "prefix_tuning"}},
            {"/training/gradient_checkpointing": "use false or auto"},
        ),
        (
            {"adapter": {"use_dora": True}, "quantization": {"type": "int8"}},
            {"/adapter/use_dora": "DoRA does not run on an int8 base: use nf4, fp4 or none"},
        ),
        *(
            (
                {"training": {"train_on": "all"}, "objective": {"type": kind}, "evaluation": {"generate_rows": 4}},
                {
                    "/training/train_on": f'{kind} compares answers, not questions: leave train_on at "assistant"',
                    "/evaluation/generate_rows": f"{kind} rows have no single right answer",
                },
            )
            for kind in ("dpo", "orpo", "kto")
        ),
        (
            {
                "validation": NOTHING_HELD_OUT,
                "training": {"early_stopping_patience": 2, "load_best_model_at_end": True},
                "evaluation": {"generate_rows": 1},
            },
            {
                "/training/early_stopping_patience": NOTHING_HELD_OUT_REASON,
                "/training/load_best_model_at_end": NOTHING_HELD_OUT_REASON,
                "/evaluation/generate_rows": NOTHING_HELD_OUT_REASON,
            },
        ),
    ],
)
def test_contradiction_is_refused_with_its_location(groups: dict[str, Any], findings: dict[str, str]) -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_spec({"base_model": "tiny", **groups})
    reasons = {finding.pointer: finding.reason for finding in caught.value.findings}
    assert reasons.keys() == findings.keys()
    for pointer, reason in findings.items():
        assert reason in reasons[pointer]
    assert caught.value.location == next(iter(findings))


@pytest.mark.parametrize(
    "groups",
    [
        {"training": {"loraplus_lr_ratio": 16}, "adapter": {"use_dora": True}},
        {"training": {"neftune_noise_alpha": 5}, "adapter": {"method": "llama_adapter"}},
        {"training": {"gradient_checkpointing": False}, "adapter": {"method": "prefix_tuning"}},
        {"training": {"gradient_checkpointing": True}, "adapter": {"method": "prompt_tuning"}},
        {"quantization": {"type": "int8"}, "adapter": {"use_dora": False}},
        {"objective": {"type": "dpo"}, "training": {"train_on": "assistant"}, "evaluation": {"questions": ["Why?"]}},
        {"training": {"train_on": "all"}, "evaluation": {"generate_rows": 4}},
        {"validation": {"fraction": 0.1}, "training": {"early_stopping_patience": 2}},
    ],
)
def test_consistent_combination_is_accepted(groups: dict[str, Any]) -> None:
    assert parse_spec({"base_model": "tiny", **groups}).base_model == "tiny"
