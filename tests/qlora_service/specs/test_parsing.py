"""Errors of a spec: every finding with its JSON pointer."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_service.errors import InvalidSpec
from qlora_service.specs import parse_spec


def parse_error(document: Any) -> InvalidSpec:
    with pytest.raises(InvalidSpec) as caught:
        parse_spec(document)
    return caught.value


def spec(**groups: Any) -> dict[str, Any]:
    return {"base_model": "tiny", **groups}


@pytest.mark.parametrize(
    ("document", "pointer", "reason"),
    [
        (spec(trainin={}), "/trainin", "unknown field 'trainin': did you mean 'training'?"),
        (
            spec(training={"learning_rat": 1e-3}),
            "/training/learning_rat",
            "unknown field 'learning_rat': did you mean 'learning_rate'?",
        ),
        (spec(adapter={"alpha": 1}), "/adapter/alpha", "did you mean 'lora_alpha'?"),
        (spec(validation={"zzz": 1}), "/validation/zzz", "known fields: dataset_id, fraction, max_rows"),
        (spec(dataset={"idd": "x"}), "/dataset/idd", "did you mean 'id'?"),
        ({}, "/base_model", "this field is required"),
        ([], "/", "this must be an object with fields"),
        (spec(training=None), "/training", "this must be an object with fields"),
        (spec(adapter={"r": 0}), "/adapter/r", "greater than or equal to 1"),
        (spec(adapter={"r": 513}), "/adapter/r", "less than or equal to 512"),
        (spec(adapter={"lora_dropout": 1.0}), "/adapter/lora_dropout", "less than 1"),
        (spec(adapter={"target_modules": []}), "/adapter", "target_modules is empty: name at least one"),
        (
            spec(adapter={"method": "adalore"}),
            "/adapter/method",
            "unknown method 'adalore': did you mean 'adalora'?",
        ),
        (spec(adapter={"method": None}), "/adapter/method", "known methods: lora, adalora, ia3, vera, oft, prompt_tun"),
        (spec(objective={"type": "dpoo"}), "/objective/type", "unknown type 'dpoo': did you mean 'dpo'?"),
        (spec(objective={"type": "rlhf"}), "/objective/type", "known types: supervised, dpo, orpo, kto"),
        (
            spec(adapter={"method": "ia3", "r": 4}),
            "/adapter/r",
            "unknown field 'r': known fields: feedforward_modules, method, target_modules",
        ),
        (
            spec(objective={"type": "orpo", "desirable_weight": 2}),
            "/objective/desirable_weight",
            "unknown field 'desirable_weight': known fields: beta, type",
        ),
        (
            spec(adapter={"method": "vera", "vera_dropuot": 0.1}),
            "/adapter/vera_dropuot",
            "unknown field 'vera_dropuot': did you mean 'vera_dropout'?",
        ),
        (spec(recipe="fats"), "/recipe", "'qlora-paper', 'lit-llama-alpaca' or 'fast'"),
        (spec(recipe="fast", training=None), "/training", "this must be an object with fields"),
        (spec(adapter=[]), "/adapter", "this must be an object with fields"),
        (
            spec(recipe="lit-llama-alpaca", training={"max_steps": 50}),
            "/training",
            "warmup_steps = 100 leaves none of max_steps = 50",
        ),
        (spec(training={"max_steps": 0}), "/training/max_steps", "greater than or equal to 1"),
        (spec(training={"learning_rate": float("nan")}), "/training/learning_rate", "finite"),
        (spec(training={"learning_rate": float("inf")}), "/training/learning_rate", "finite"),
        (spec(training={"seed": 2**31}), "/training/seed", "less than or equal to"),
        (spec(training={"optim": "torch.optim.SGD"}), "/training/optim", "'paged_adamw_32bit'"),
        (spec(quantization={"type": "gptq"}), "/quantization/type", "'nf4', 'fp4', 'int8' or 'none'"),
        (spec(validation={"fraction": 0.6}), "/validation/fraction", "less than or equal to 0.5"),
        (spec(name=""), "/name", "at least 1 character"),
        (spec(name="\ud800"), "/name", "unicode"),
        (spec(base_model=""), "/base_model", "at least 1 character"),
        (spec(metadata={"a/b~": 3}), "/metadata/a~1b~0", "valid string"),
        (spec(metadata={str(number): "" for number in range(17)}), "/metadata", "at most 16"),
        (spec(dataset={"rows": [1]}), "/dataset/rows/0", "dictionary"),
        (spec(dataset={"rows": [{"text": "a"}, {"a": {"b": [float("nan")]}}]}), "/dataset/rows/1/a/b/0", "finite"),
        (spec(dataset={"id": "ds_1", "rows": []}), "/dataset", "give either `id` or `rows`, not both"),
        (spec(dataset={"id": "ds_1", "shape": "text"}), "/dataset", "leave both out beside `id`"),
        (spec(dataset={"rows": [], "container": "csv"}), "/dataset", "leave it out beside `rows`"),
    ],
)
def test_fault_is_refused_with_its_location(document: Any, pointer: str, reason: str) -> None:
    error = parse_error(document)
    assert error.code == "invalid_spec"
    assert error.location == pointer
    assert [finding.pointer for finding in error.findings] == [pointer]
    assert reason in error.findings[0].reason
    assert not error.findings[0].reason.startswith("Value error")
    assert error.message == f"{pointer}: {error.findings[0].reason}"


def test_all_faults_are_reported_at_once() -> None:
    error = parse_error({"training": {"learning_rte": 1, "batch_size": 0}, "adapter": {"r": "many"}})
    assert [finding.pointer for finding in error.findings] == [
        "/base_model", "/adapter/r", "/training/batch_size", "/training/learning_rte",
    ]  # fmt: skip
    assert error.message == "/base_model: this field is required (and 3 more)"


def test_pointers_contain_no_union_members() -> None:
    error = parse_error(spec(adapter={"target_modules": ["q_proj", "a.b"]}))
    assert error.findings[-1].pointer == "/adapter/target_modules/1"
    assert {finding.pointer for finding in error.findings} <= {
        "/adapter/target_modules", "/adapter/target_modules/1",
    }  # fmt: skip


def test_fields_of_rows_are_not_mistaken_for_fields_of_the_spec() -> None:
    error = parse_error(spec(dataset={"rows": [{"adapter": 1}], "adapter": 1}))
    assert error.findings[0].reason == "unknown field 'adapter': known fields: container, id, rows, shape"


def test_contradiction_with_a_recipe_has_its_location() -> None:
    error = parse_error(spec(recipe="fast", training={"early_stopping_patience": 2}, validation={"fraction": 0}))
    assert error.location == "/training/early_stopping_patience"
    error = parse_error(
        spec(recipe="fast", training={"gradient_checkpointing": True}, adapter={"method": "prefix_tuning"})
    )
    assert error.location == "/training/gradient_checkpointing"
