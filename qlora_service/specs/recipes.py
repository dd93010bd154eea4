"""Recipes: named sets of values for fields that a spec leaves out, each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from qlora_service.specs.part import SpecPart

RecipeName = Literal["qlora-paper", "lit-llama-alpaca", "fast"]


@dataclass(frozen=True)
class Recipe:
    """Values by group of the spec, and their source."""

    title: str
    source: str
    values: dict[str, dict[str, Any]]


RECIPES: dict[RecipeName, Recipe] = {
    "qlora-paper": Recipe(
        title="QLoRA as published: NF4, double quantization, r=64 on every linear layer, paged AdamW",
        source="Dettmers et al. 2023, arXiv:2305.14314, section 4, table 9 and appendix B, the values for 7B and 13B; "
        "warm-up from the scripts published with it. From 33B: learning rate 1e-4, dropout 0.05",
        values={
            "quantization": {"type": "nf4", "double_quant": True},
            "adapter": {
                "method": "lora", "r": 64, "lora_alpha": 16.0, "lora_dropout": 0.1, "target_modules": "all-linear",
            },
            "training": {
                "batch_size": 16, "learning_rate": 2e-4, "lr_scheduler_type": "constant", "warmup_ratio": 0.03,
                "max_grad_norm": 0.3, "optim": "paged_adamw_32bit", "adam_beta2": 0.999, "max_seq_len_tokens": 512,
                "too_long": "truncate",
            },
        },
    ),
    "lit-llama-alpaca": Recipe(
        title="Lit-LLaMA's LoRA for Alpaca's 52,000 or Dolly's 15,000 rows: r=8 on queries and values, five epochs",
        source="Lit-LLaMA, finetune/lora.py: rate 3e-4 after 100 steps of warm-up, batch 128, r 8, alpha 16, dropout "
        "0.05, questions trained too, no clipping. Rows of 512 tokens and five epochs as commonly reported (the file "
        "has 256 and three). Its micro-batch of 4 is left out: here it does not change the result",
        values={
            "adapter": {
                "method": "lora", "r": 8, "lora_alpha": 16.0, "lora_dropout": 0.05,
                "target_modules": ["q_proj", "v_proj"],
            },
            "training": {
                "batch_size": 128, "epochs": 5.0, "learning_rate": 3e-4, "lr_scheduler_type": "constant",
                "warmup_steps": 100, "weight_decay": 0.0, "max_grad_norm": 1000.0, "optim": "adamw_torch",
                "max_seq_len_tokens": 512, "too_long": "truncate", "train_on": "all",
            },
        },
    ),
    "fast": Recipe(
        title="Plain LoRA without dropout, which uses the fast path, 8-bit optimizer state, and LoRA+",
        source="This project: `python -m tests.benchmarks engine` measures steps of this kind; LoRA+ is "
        "arXiv:2402.12354, at a ratio below its 16",
        values={
            "quantization": {"type": "nf4", "double_quant": True},
            "adapter": {
                "method": "lora", "r": 16, "lora_alpha": 32.0, "lora_dropout": 0.0, "target_modules": "all-linear",
            },
            "training": {
                "batch_size": 16, "learning_rate": 2e-4, "lr_scheduler_type": "linear", "warmup_ratio": 0.03,
                "loraplus_lr_ratio": 4.0, "optim": "paged_adamw_8bit", "micro_batch_tokens": "auto",
                "gradient_checkpointing": "auto",
            },
        },
    ),
}  # fmt: skip


def with_recipe(spec: Any) -> Any:
    """The spec with its recipe's values in the fields that it leaves out; any other value is returned unchanged.

    Leaves out recipe values for another adapter method or objective than the spec's, and recipe values that would
    override another field of the spec.
    """
    name = spec.get("recipe") if isinstance(spec, dict) else None
    recipe = RECIPES.get(name) if isinstance(name, str) else None  # type: ignore[call-overload]
    if recipe is None:
        return spec
    groups = {group: _given_values(spec, group) for group in (*recipe.values, "objective")}
    excluded = set()
    if groups["adapter"].get("method", "lora") != recipe.values["adapter"]["method"]:
        excluded = {"loraplus_lr_ratio", *recipe.values["adapter"]}
    if groups["objective"].get("type", "supervised") != "supervised":
        excluded.add("train_on")
    if "warmup_ratio" in groups["training"]:
        excluded.add("warmup_steps")
    filled = dict(spec)
    for group, values in recipe.values.items():
        if isinstance(spec.get(group, {}), dict | SpecPart):  # other types are refused by the validation
            filled[group] = {key: value for key, value in values.items() if key not in excluded} | groups[group]
    return filled


def _given_values(spec: dict[str, Any], group: str) -> dict[str, Any]:
    """The values that the spec sets in a group."""
    given = spec.get(group)
    if isinstance(given, SpecPart):
        return given.model_dump(exclude_unset=True)
    return given if isinstance(given, dict) else {}
