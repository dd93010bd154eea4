"""What is offered for a job that does not fit has to fit, and a little more than it must not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qlora_service.planning.cards import named_device
from qlora_service.planning.fit import Question, fastest_fit, surely_fits, with_changes
from qlora_service.planning.known_models import KNOWN_MODELS
from qlora_service.planning.remedies import LENGTH, LENGTH_STEP, alternatives, largest
from tests.qlora_service.planning.test_fit import question


def changed(asked: Question, changes: dict[str, Any]) -> Question:
    longest = min(asked.longest_tokens, changes.get(LENGTH, asked.longest_tokens))
    return replace(asked, spec=with_changes(asked.spec, changes), longest_tokens=longest)


@pytest.mark.parametrize(
    ("asked", "offered"),
    [
        (
            question("Llama-3.1-8B", "12GB", 4096, training={"gradient_checkpointing": False}),
            {"training.gradient_checkpointing": "auto"},
        ),
        (
            question("Llama-3.1-8B", "12GB", 512, training={"micro_batch_tokens": 100_000, "batch_size": 500}),
            {"training.micro_batch_tokens": "auto"},
        ),
        (question("Llama-2-7B", "12GB", 512, quantization={"type": "none"}), {"quantization.type": "nf4"}),
        (
            question("Llama-2-7B", "8GB", 512, adapter={"r": 512}, training={"optim": "adamw_torch"}),
            {"adapter.r": 32},
        ),
    ],
)
def test_each_change_alone_makes_the_job_fit(asked: Question, offered: dict[str, Any]) -> None:
    assert not fastest_fit(asked).fits
    found = alternatives(asked)
    assert offered in found
    assert all(surely_fits(changed(asked, changes)) for changes in found)


def test_the_length_that_is_offered_is_the_greatest() -> None:
    asked = question("Llama-3.1-8B", "12GB", 16384)
    (length,) = (changes[LENGTH] for changes in alternatives(asked) if changes.keys() == {LENGTH})
    assert surely_fits(replace(asked, longest_tokens=length))
    assert not surely_fits(replace(asked, longest_tokens=length + LENGTH_STEP))
    assert largest(asked).max_seq_len_tokens == length


def test_where_no_change_is_enough_several_are_named_together() -> None:
    wasteful = {"quantization": {"type": "none"}, "training": {"gradient_checkpointing": False}}
    asked = question("Llama-2-13B", "12GB", 4096, **wasteful)
    (together,) = alternatives(asked)
    assert {"quantization.type", "training.gradient_checkpointing"} <= together.keys()
    assert surely_fits(changed(asked, together))


def test_nothing_is_offered_where_the_weights_alone_are_too_large() -> None:
    asked = question("LLaMA-65B", "24GB", 512)
    assert alternatives(asked) == []
    found = largest(asked)
    assert (found.max_seq_len_tokens, found.batch_size) == (None, None)
    assert found.model is not None
    assert surely_fits(replace(asked, shape=KNOWN_MODELS[found.model]))
    larger = [shape for shape in KNOWN_MODELS.values() if shape.parameters > KNOWN_MODELS[found.model].parameters]
    assert larger
    assert not any(surely_fits(replace(asked, shape=shape)) for shape in larger)


def test_a_batch_is_never_what_is_too_large() -> None:
    """A step is cut into micro-batches: either every batch fits or, but for the first's gradients, none."""
    fits_any = replace(question("Llama-2-7B", "12GB", 1024), device=named_device("12GB"))
    assert largest(fits_any).batch_size == fits_any.spec.training.batch_size
    assert largest(question("Llama-2-7B", "12GB", 1024, training={"batch_size": 4096})).batch_size == 4096
    assert largest(question("LLaMA-65B", "24GB", 512)).batch_size is None
