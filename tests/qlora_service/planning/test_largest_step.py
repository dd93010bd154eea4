"""The largest micro-batch of a job."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_service.data.batching import pack
from qlora_service.planning.largest_step import largest_step
from qlora_service.specs import JobSpec


def job(batch_size: int = 16, **groups: Any) -> JobSpec:
    return JobSpec.model_validate({"base_model": "m", "training": {"batch_size": batch_size}} | groups)


@pytest.mark.parametrize(
    ("batch_size", "budget", "longest", "lengths", "whole"),
    [
        (16, 2048, 1024, (1024, 1024), False),
        (16, 2500, 1024, (1024, 1024, 452), False),
        (16, 2050, 1024, (1024, 1024), False),  # the rest of two tokens is too short for an example
        (16, 512, 1024, (1024,), False),  # longer than the budget: a micro-batch of its own
        (1, 2048, 1024, (1024,), True),
        (2, 2048, 1024, (1024, 1024), True),
        (3, 4096, 1024, (1024, 1024, 1024), True),
    ],
)
def test_largest_micro_batch_is_as_full_as_the_budget_allows(
    batch_size: int, budget: int, longest: int, lengths: tuple[int, ...], whole: bool
) -> None:
    step = largest_step(job(batch_size), micro_batch_tokens=budget, longest_tokens=longest)
    assert (step.lengths, step.is_whole_step, step.tokens) == (lengths, whole, sum(lengths))
    assert len(pack(step.lengths, budget)) == 1


def test_largest_micro_batch_has_both_sides_of_each_pair() -> None:
    step = largest_step(job(objective={"type": "dpo"}), micro_batch_tokens=2100, longest_tokens=500)
    assert step.lengths == (500, 500, 500, 500, 50, 50)
    assert not step.is_whole_step
    alone = largest_step(job(1, objective={"type": "orpo"}), micro_batch_tokens=100, longest_tokens=500)
    assert (alone.lengths, alone.is_whole_step) == ((500, 500), True)
