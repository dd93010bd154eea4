"""Remedies for a job that does not fit: each makes it fit, and a slightly larger value does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qlora_service.planning.cards import named_device
from qlora_service.planning.fit import FitQuestion, fastest_fit, surely_fits, with_changes
from qlora_service.planning.known_models import KNOWN_MODELS
from qlora_service.planning.remedies import LENGTH, LENGTH_STEP_TOKENS, alternatives, limits
from tests.qlora_service.planning.test_fit import make_question


def changed(question: FitQuestion, changes: dict[str, Any]) -> FitQuestion:
    longest = min(question.longest_tokens, changes.get(LENGTH, question.longest_tokens))
    return replace(question, spec=with_changes(question.spec, changes), longest_tokens=longest)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        (
            make_question("Llama-3.1-8B", "12GB", 4096, training={"gradient_checkpointing": False}),
            {"training.gradient_checkpointing": "auto"},
        ),
        (
            make_question("Llama-3.1-8B", "12GB", 512, training={"micro_batch_tokens": 100_000, "batch_size": 500}),
            {"training.micro_batch_tokens": "auto"},
        ),
        (make_question("Llama-2-7B", "12GB", 512, quantization={"type": "none"}), {"quantization.type": "nf4"}),
        (
            make_question("Llama-2-7B", "8GB", 512, adapter={"r": 512}, training={"optim": "adamw_torch"}),
            {"adapter.r": 32},
        ),
    ],
)
def test_each_change_alone_makes_the_job_fit(question: FitQuestion, expected: dict[str, Any]) -> None:
    assert not fastest_fit(question).fits
    proposed = alternatives(question)
    assert expected in proposed
    assert all(surely_fits(changed(question, changes)) for changes in proposed)


def test_proposed_length_is_the_greatest_that_fits() -> None:
    question = make_question("Llama-3.1-8B", "12GB", 16384)
    (length,) = (changes[LENGTH] for changes in alternatives(question) if changes.keys() == {LENGTH})
    assert surely_fits(replace(question, longest_tokens=length))
    assert not surely_fits(replace(question, longest_tokens=length + LENGTH_STEP_TOKENS))
    assert limits(question).max_seq_len_tokens == length


def test_changes_are_combined_where_none_alone_is_enough() -> None:
    wasteful = {"quantization": {"type": "none"}, "training": {"gradient_checkpointing": False}}
    question = make_question("Llama-2-13B", "12GB", 4096, **wasteful)
    (combined,) = alternatives(question)
    assert {"quantization.type", "training.gradient_checkpointing"} <= combined.keys()
    assert surely_fits(changed(question, combined))


def test_no_change_is_proposed_where_the_weights_alone_are_too_large() -> None:
    question = make_question("LLaMA-65B", "24GB", 512)
    assert alternatives(question) == []
    device_limits = limits(question)
    assert (device_limits.max_seq_len_tokens, device_limits.batch_size) == (None, None)
    assert device_limits.model is not None
    largest = KNOWN_MODELS[device_limits.model]
    assert surely_fits(replace(question, shape=largest))
    larger = [shape for shape in KNOWN_MODELS.values() if shape.parameters > largest.parameters]
    assert larger
    assert not any(surely_fits(replace(question, shape=shape)) for shape in larger)


def test_batch_size_is_never_the_reason() -> None:
    """A step is split into micro-batches: every batch size fits or, apart from the gradients of the first, none."""
    fits_any = replace(make_question("Llama-2-7B", "12GB", 1024), device=named_device("12GB"))
    assert limits(fits_any).batch_size == fits_any.spec.training.batch_size
    assert limits(make_question("Llama-2-7B", "12GB", 1024, training={"batch_size": 4096})).batch_size == 4096
    assert limits(make_question("LLaMA-65B", "24GB", 512)).batch_size is None
