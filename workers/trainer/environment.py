"""Device and package versions of an attempt, and the differences to the environment of the attempt before."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

from qlora_service.training.device import device_name

PACKAGES = ("qlora-service", "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "datasets", "safetensors")


def package_versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Device, threads and package versions: with the job's inputs, everything that its adapter's bytes depend on."""
    return {"device": device_name(device), "threads": torch.get_num_threads(), "versions": package_versions()}


def inherit_plan(plan: dict[str, Any] | None, environment: dict[str, Any]) -> dict[str, Any]:
    """The plan of the attempt before, as far as it holds in `environment`; an empty one for a first attempt.

    In another environment the kernels are chosen again, and the memory settings stay.
    """
    if plan is None:
        return {"changes": []}
    if all(plan[key] == value for key, value in environment.items()):
        return dict(plan)
    return {key: plan[key] for key in ("micro_batch_tokens", "gradient_checkpointing", "compute_dtype", "changes")}


def environment_changes(before: dict[str, Any], now: dict[str, Any], step: int) -> list[dict[str, Any]]:
    """The differences of two environments, as changes of the plan after `step` completed steps."""
    flat_before, flat_now = _flatten(before), _flatten(now)
    return [
        {"step": step + 1, "what": name, "from": flat_before.get(name), "to": value, "why": "resumed elsewhere"}
        for name, value in flat_now.items()
        if flat_before.get(name) != value
    ]


def change_note(change: dict[str, Any]) -> str:
    """A change of the plan, for users."""
    return (
        f"from step {change['step']} on, {change['what']} is {change['to']} instead of {change['from']} "
        f"({change['why']}): the adapter equals that of an uninterrupted run up to rounding, not byte for byte"
    )


def _flatten(environment: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in environment.items() if key != "versions"} | environment["versions"]
