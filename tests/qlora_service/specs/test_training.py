"""Limits of the training and evaluation settings."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from qlora_service.specs import Evaluation, Training


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"warmup_steps": 10, "max_steps": 10}, "warmup_steps = 10 leaves none of max_steps = 10 at the full rate"),
        ({"warmup_steps": -1}, "greater than or equal to 0"),
        ({"loraplus_lr_ratio": 0.5}, "greater than or equal to 1"),
        ({"neftune_noise_alpha": 0}, "greater than 0"),
        ({"early_stopping_patience": 0}, "greater than or equal to 1"),
        ({"optim": "adamw"}, "'paged_adamw_32bit'"),
        ({"gradient_checkpointing": "yes"}, "'auto'"),
        ({"batch_size": True}, "valid integer"),
        ({"train_on": "questions"}, "'assistant' or 'all'"),
    ],
)
def test_training_value_outside_its_limits_is_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Training(**values)
    assert reason in str(caught.value)


def test_warmup_of_all_steps_but_the_last_is_accepted() -> None:
    assert Training(warmup_steps=9, max_steps=10).warmup_steps == 9


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"every_steps": 0}, "greater than or equal to 1"),
        ({"generate_rows": 257}, "less than or equal to 256"),
        ({"questions": [""]}, "at least 1 character"),
        ({"questions": ["?"] * 17}, "at most 16 items"),
        ({"max_new_tokens": 0}, "greater than or equal to 1"),
    ],
)
def test_evaluation_value_outside_its_limits_is_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Evaluation(**values)
    assert reason in str(caught.value)
