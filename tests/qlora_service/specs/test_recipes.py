"""Values that recipes fill in, and values that they leave out."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_service.specs import IA3, RECIPES, JobSpec, Lora, Training, parse_spec

OTHER_VALUES: dict[str, Any] = {
    "type": "fp4", "double_quant": False, "r": 3, "lora_alpha": 7.0, "lora_dropout": 0.2, "target_modules": ["o_proj"],
    "batch_size": 5, "epochs": 2.5, "learning_rate": 0.5, "lr_scheduler_type": "cosine", "warmup_ratio": 0.5,
    "warmup_steps": 7, "weight_decay": 0.3, "max_grad_norm": 9.0, "optim": "paged_lion_8bit", "adam_beta2": 0.5,
    "max_seq_len_tokens": 99, "too_long": "drop", "train_on": "assistant", "loraplus_lr_ratio": 2.0,
    "micro_batch_tokens": 33, "gradient_checkpointing": False, "method": "lora",
}  # fmt: skip


def parsed_values(**groups: Any) -> dict[str, Any]:
    return parse_spec({"base_model": "tiny", **groups}).model_dump()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_fills_in_absent_fields(name: Any) -> None:
    plain, filled = parsed_values(), parsed_values(recipe=name)
    for group, values in RECIPES[name].values.items():
        assert {field: filled[group][field] for field in values} == values
        assert {field: value for field, value in filled[group].items() if field not in values} == {
            field: value for field, value in plain[group].items() if field not in values
        }
    assert filled["recipe"] == name
    assert {key: filled[key] for key in filled.keys() - RECIPES[name].values.keys() - {"recipe"}} == {
        key: plain[key] for key in plain.keys() - RECIPES[name].values.keys() - {"recipe"}
    }


@pytest.mark.parametrize(
    ("name", "group", "field"),
    [
        (name, group, field)
        for name, recipe in RECIPES.items()
        for group in recipe.values
        for field in recipe.values[group]
    ],
)
def test_recipe_never_overrides_a_given_field(name: Any, group: str, field: str) -> None:
    filled = parsed_values(recipe=name, **{group: {field: OTHER_VALUES[field]}})[group]
    assert filled[field] == OTHER_VALUES[field]
    assert field == "method" or OTHER_VALUES[field] != RECIPES[name].values[group][field]
    for other, value in RECIPES[name].values[group].items():
        assert other == field or filled[other] == value


def test_recipe_does_not_override_through_another_field() -> None:
    training = parsed_values(recipe="lit-llama-alpaca", training={"warmup_ratio": 0.5})["training"]
    assert (training["warmup_ratio"], training["warmup_steps"]) == (0.5, None)
    assert parsed_values(recipe="lit-llama-alpaca", training={"max_steps": 500})["training"]["max_steps"] == 500


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_values_of_lora_are_left_out_for_another_method(name: Any) -> None:
    filled = parsed_values(recipe=name, adapter={"method": "vera"})
    assert filled["adapter"] == parsed_values(adapter={"method": "vera"})["adapter"]
    assert filled["training"]["loraplus_lr_ratio"] is None
    assert filled["training"]["learning_rate"] == RECIPES[name].values["training"]["learning_rate"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_accepted_with_a_preference_objective(name: Any) -> None:
    filled = parsed_values(recipe=name, objective={"type": "dpo"})
    assert filled["training"]["train_on"] == "assistant"


def test_recipe_fills_in_parts_given_as_objects() -> None:
    built = JobSpec(base_model="m", recipe="fast", adapter=Lora(r=3), training=Training(batch_size=5))
    assert (built.adapter.model_dump()["r"], built.training.batch_size) == (3, 5)
    assert built.training.optim == "paged_adamw_8bit"
    other = JobSpec(base_model="m", recipe="fast", adapter=IA3(method="ia3"))
    assert (other.adapter, other.training.loraplus_lr_ratio) == (IA3(method="ia3"), None)


def test_lit_llama_recipe_has_the_published_values() -> None:
    """Source: Lit-LLaMA, finetune/lora.py, with rows of 512 tokens and five epochs."""
    spec = parse_spec({"base_model": "m", "recipe": "lit-llama-alpaca"})
    assert spec.adapter == Lora(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
    assert spec.training.model_dump(
        include={"learning_rate", "batch_size", "max_seq_len_tokens", "warmup_steps", "epochs", "train_on"}
    ) == {
        "learning_rate": 3e-4, "batch_size": 128, "max_seq_len_tokens": 512, "warmup_steps": 100, "epochs": 5.0,
        "train_on": "all",
    }  # fmt: skip
