"""Inherited plans, and the differences of two environments."""

from __future__ import annotations

import torch

from workers.trainer.environment import change_note, describe_environment, environment_changes, inherit_plan

ENVIRONMENT = {"device": "x86_64 CPU", "threads": 2, "versions": {"torch": "2.13.0", "peft": "0.21.2"}}
PLAN = {
    **ENVIRONMENT,
    "fused": True,
    "layers": "llama",
    "compute_dtype": "bfloat16",
    "micro_batch_tokens": 512,
    "gradient_checkpointing": True,
    "changes": [],
}


def test_the_first_attempt_starts_with_an_empty_plan() -> None:
    assert inherit_plan(None, ENVIRONMENT) == {"changes": []}


def test_the_same_environment_inherits_the_whole_plan() -> None:
    assert inherit_plan(PLAN, ENVIRONMENT) == PLAN


def test_another_environment_inherits_the_memory_settings_but_no_kernels() -> None:
    other = ENVIRONMENT | {"device": "NVIDIA GeForce RTX 4090"}
    assert inherit_plan(PLAN, other) == {
        "micro_batch_tokens": 512,
        "gradient_checkpointing": True,
        "compute_dtype": "bfloat16",
        "changes": [],
    }


def test_every_difference_is_a_change_from_the_next_step_on() -> None:
    now = ENVIRONMENT | {"threads": 4, "versions": ENVIRONMENT["versions"] | {"torch": "2.14.0"}}  # type: ignore[operator]
    changes = environment_changes(ENVIRONMENT, now, 12)
    assert [(change["what"], change["from"], change["to"], change["step"]) for change in changes] == [
        ("threads", 2, 4, 13),
        ("torch", "2.13.0", "2.14.0", 13),
    ]
    assert change_note(changes[1]).startswith("from step 13 on, torch is 2.14.0 instead of 2.13.0")
    assert environment_changes(ENVIRONMENT, ENVIRONMENT, 12) == []


def test_environment_of_this_machine_has_threads_and_versions() -> None:
    described = describe_environment(torch.device("cpu"))
    assert described["threads"] == torch.get_num_threads()
    assert described["versions"]["bitsandbytes"]
