from __future__ import annotations

import torch

from workers.trainer.environment import change_note, describe_environment, environment_changes, inherit_plan

HERE = {"device": "x86_64 CPU", "threads": 2, "versions": {"torch": "2.13.0", "peft": "0.21.2"}}
PLAN = {
    **HERE,
    "fused": True,
    "layers": "llama",
    "compute_dtype": "bfloat16",
    "micro_batch_tokens": 512,
    "gradient_checkpointing": True,
    "changes": [],
}


def test_the_first_attempt_plans_from_nothing() -> None:
    assert inherit_plan(None, HERE) == {"changes": []}


def test_the_same_environment_takes_the_whole_plan_over() -> None:
    assert inherit_plan(PLAN, HERE) == PLAN


def test_elsewhere_kernels_are_chosen_anew_and_memory_is_used_as_before() -> None:
    elsewhere = HERE | {"device": "NVIDIA GeForce RTX 4090"}
    assert inherit_plan(PLAN, elsewhere) == {
        "micro_batch_tokens": 512,
        "gradient_checkpointing": True,
        "compute_dtype": "bfloat16",
        "changes": [],
    }


def test_every_difference_is_named_with_the_step_it_counts_from() -> None:
    now = HERE | {"threads": 4, "versions": HERE["versions"] | {"torch": "2.14.0"}}  # type: ignore[operator]
    changes = environment_changes(HERE, now, 12)
    assert [(change["what"], change["from"], change["to"], change["step"]) for change in changes] == [
        ("threads", 2, 4, 13),
        ("torch", "2.13.0", "2.14.0", 13),
    ]
    assert change_note(changes[1]).startswith("from step 13 on, torch is 2.14.0 instead of 2.13.0")
    assert environment_changes(HERE, HERE, 12) == []


def test_this_machine_describes_itself() -> None:
    described = describe_environment(torch.device("cpu"))
    assert described["threads"] == torch.get_num_threads()
    assert described["versions"]["bitsandbytes"]
