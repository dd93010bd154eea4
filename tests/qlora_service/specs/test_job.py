"""Defaults, stored form and JSON schema of a job's spec."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from qlora_service.specs import RECIPES, Adapter, JobSpec, Objective, Validation, parse_spec

# Source: the QLoRA paper (arXiv:2305.14314), sections 3 and 4, table 9, appendix B; warm-up from its scripts.
PAPER: dict[str, dict[str, Any]] = {
    "quantization": {"type": "nf4", "double_quant": True},
    "adapter": {"method": "lora", "target_modules": "all-linear"},
    "training": {
        "batch_size": 16,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.03,
        "max_grad_norm": 0.3,
        "optim": "paged_adamw_32bit",
        "adam_beta2": 0.999,
    },
}


def members(union: Any) -> dict[str, type[BaseModel]]:
    """The classes of a tagged union, by tag."""
    tagged = [get_args(member) for member in get_args(get_args(union)[0])]
    return {metadata.tag: kind for kind, metadata in tagged}


METHODS, OBJECTIVES = members(Adapter), members(Objective)


def spec(**groups: Any) -> dict[str, Any]:
    return {"base_model": "tiny", **groups}


@pytest.mark.parametrize("group", PAPER)
def test_defaults_are_those_of_the_paper(group: str) -> None:
    values = parse_spec(spec()).model_dump()[group]
    assert {field: values[field] for field in PAPER[group]} == PAPER[group]


def test_spec_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parse_spec(spec()).training.batch_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"adapter": {"target_modules": ["q_proj"]}, "metadata": {"a": "b"}, "training": {"epochs": 0.5}},
        *({"adapter": {"method": method}} for method in METHODS),
        *({"objective": {"type": kind}} for kind in OBJECTIVES),
        *({"recipe": name} for name in RECIPES),
        *({"recipe": name, "adapter": {"method": "ia3"}} for name in RECIPES),
        *({"recipe": name, "objective": {"type": "dpo"}} for name in RECIPES),
        {"recipe": "lit-llama-alpaca", "training": {"warmup_ratio": 0.1, "optim": "adamw_8bit"}},
        {"quantization": {"type": "int8"}, "validation": {"fraction": 0}},
    ],
)
def test_stored_spec_is_parsed_to_the_same_spec(given: dict[str, Any]) -> None:
    original = parse_spec(spec(**given))
    for mode in ("json", "python"):
        stored = original.model_dump(mode=mode)
        assert parse_spec(stored) == original
        assert parse_spec(stored).model_dump(mode=mode) == stored


@pytest.mark.parametrize(
    "given", [{}, {"recipe": "fast"}, {"adapter": {"method": "oft"}, "objective": {"type": "kto"}}]
)
def test_dump_of_the_set_fields_is_parsed_to_the_same_spec(given: dict[str, Any]) -> None:
    original = parse_spec(spec(**given))
    assert parse_spec(original.model_dump(mode="json", exclude_unset=True)) == original


@pytest.mark.parametrize(("field", "tag", "union"), [("adapter", "method", METHODS), ("objective", "type", OBJECTIVES)])
def test_schema_distinguishes_the_members_of_a_union(field: str, tag: str, union: dict[str, type[BaseModel]]) -> None:
    schema = JobSpec.model_json_schema()
    choices = [choice["$ref"].removeprefix("#/$defs/") for choice in schema["properties"][field]["oneOf"]]
    assert choices == [kind.__name__ for kind in union.values()]
    optional = []
    for (value, kind), name in zip(union.items(), choices, strict=True):
        definition = schema["$defs"][name]
        assert definition["properties"][tag]["const"] == value
        assert definition["additionalProperties"] is False
        assert definition["description"] == kind.__doc__
        if tag not in definition.get("required", []):
            optional.append(value)
    # The tag is optional for the default member only.
    assert optional == [getattr(JobSpec(base_model="m"), field).model_dump()[tag]]


def test_every_field_has_a_description() -> None:
    schema = JobSpec.model_json_schema()
    undescribed = [
        f"{name}.{field}"
        for name, part in [("JobSpec", schema), *schema["$defs"].items()]
        for field, properties in part.get("properties", {}).items()
        if "description" not in properties and "const" not in properties
    ]
    assert undescribed == []


def test_validation_dataset_holds_out_no_rows_of_the_jobs_own_dataset() -> None:
    validation = Validation(dataset_id="ds_1", fraction=0.2)
    assert (validation.held_out_fraction, validation.holds_out) == (0.0, True)
    assert (Validation().held_out_fraction, Validation().holds_out) == (0.05, True)
    assert not Validation(fraction=0).holds_out
    stopping = {"base_model": "tiny", "training": {"early_stopping_patience": 2}}
    assert JobSpec.model_validate(stopping | {"validation": {"dataset_id": "ds_1", "fraction": 0}})
    with pytest.raises(ValidationError, match="no rows are held out"):
        JobSpec.model_validate(stopping | {"validation": {"fraction": 0}})
