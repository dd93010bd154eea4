"""What an attempt runs on, and what changes when the next one runs on something else."""

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
    """Device, threads and package versions: with the job's inputs, all that its adapter's bytes depend on."""
    return {"device": device_name(device), "threads": torch.get_num_threads(), "versions": package_versions()}


def take_over(plan: dict[str, Any] | None, environment: dict[str, Any]) -> dict[str, Any]:
    """The plan of the attempts before, frozen; of it only what still holds in another environment.

    There the kernels are chosen anew; how much memory is used stays as it was.
    """
    if plan is None:
        return {"changes": []}
    if all(plan[key] == value for key, value in environment.items()):
        return dict(plan)
    return {key: plan[key] for key in ("micro_batch_tokens", "gradient_checkpointing", "compute_dtype", "changes")}


def environment_changes(before: dict[str, Any], now: dict[str, Any], step: int) -> list[dict[str, Any]]:
    """What differs between two environments, as changes of the plan after `step` steps."""
    flat_before, flat_now = _flat(before), _flat(now)
    return [
        {"step": step + 1, "what": what, "from": flat_before.get(what), "to": value, "why": "resumed elsewhere"}
        for what, value in flat_now.items()
        if flat_before.get(what) != value
    ]


def change_note(change: dict[str, Any]) -> str:
    """A change of the plan in words."""
    return (
        f"from step {change['step']} on, {change['what']} is {change['to']} instead of {change['from']} "
        f"({change['why']}): the adapter equals an undisturbed run's up to rounding, not byte for byte"
    )


def _flat(environment: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in environment.items() if key != "versions"} | environment["versions"]
