"""What would make a job fit that does not: other settings, or the largest length, batch and model. Pure arithmetic.

Everything named here fits whatever the formula's error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from qlora_service.planning.fit import Question, surely_fits, with_changes
from qlora_service.planning.known_models import KNOWN_MODELS
from qlora_service.specs import Lora

Changes = dict[str, Any]
"""Values by dotted field of the spec, to be set together"""
LENGTH_STEP = 16
"""Tokens; lengths are named in multiples"""
SMALLER_RANKS = (64, 32, 16, 8)
LENGTH, RANK = "training.max_seq_len_tokens", "adapter.r"


@dataclass(frozen=True)
class Largest:
    """How far the job's own settings go on the device; None: not at all."""

    max_seq_len_tokens: int | None
    """With everything else as it was asked for"""
    batch_size: int | None
    """Likewise. Batches are cut into micro-batches, so that no size is too large where one is not"""
    model: str | None
    """The largest well-known model that takes the job as it was asked for"""


def alternatives(question: Question) -> list[Changes]:
    """Changes of the user's settings, each of which alone makes the job fit; if none does, what together does.

    Empty: no setting helps.
    """
    single = list(_single_changes(question))
    ranks = [{RANK: rank} for rank in _smaller_ranks(question)]
    helpful = [changes for changes in single if _helps(question, changes)]
    helpful += [changes for changes in ranks if _helps(question, changes)][:1]
    if (length := longest_that_fits(question)) is not None:
        helpful.append({LENGTH: length})
    if helpful:
        return helpful
    together: Changes = {}
    for changes in [*single, *ranks[-1:]]:
        together |= changes
    if not together or (changed := _changed(question, together)) is None:
        return []
    if surely_fits(changed):
        return [together]
    length = longest_that_fits(changed)
    return [] if length is None else [together | {LENGTH: length}]


def largest(question: Question) -> Largest:
    """What the device takes of such a job."""
    fitting = [name for name, shape in KNOWN_MODELS.items() if surely_fits(replace(question, shape=shape))]
    return Largest(
        max_seq_len_tokens=longest_that_fits(question),
        batch_size=_largest_batch(question),
        model=max(fitting, key=lambda name: KNOWN_MODELS[name].parameters, default=None),
    )


def longest_that_fits(question: Question) -> int | None:
    """The greatest length up to the question's with which the job fits; None when none does."""

    def fits(steps: int) -> bool:
        return surely_fits(replace(question, longest_tokens=steps * LENGTH_STEP))

    steps = _most(question.longest_tokens // LENGTH_STEP, fits)
    return None if steps is None else steps * LENGTH_STEP


def _largest_batch(question: Question) -> int | None:
    def fits(size: int) -> bool:
        changed = _changed(question, {"training.batch_size": size})
        return changed is not None and surely_fits(changed)

    return _most(question.spec.training.batch_size, fits)


def _most(limit: int, holds: Callable[[int], bool]) -> int | None:
    """The greatest number from 1 to `limit` for which it holds, as it does for all smaller ones."""
    if limit < 1 or not holds(1):
        return None
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _single_changes(question: Question) -> Iterator[Changes]:
    """Those that leave the rows whole, the cheapest for the result first."""
    training, quantization = question.spec.training, question.spec.quantization
    if training.gradient_checkpointing is False:
        yield {"training.gradient_checkpointing": "auto"}
    if training.micro_batch_tokens != "auto":
        yield {"training.micro_batch_tokens": "auto"}
    if not training.optim.endswith("8bit") or not training.optim.startswith("paged"):
        yield {"training.optim": "paged_lion_8bit" if "lion" in training.optim else "paged_adamw_8bit"}
    if quantization.type not in {"nf4", "fp4"}:
        yield {"quantization.type": "nf4"}
    if not quantization.double_quant:
        yield {"quantization.double_quant": True}


def _smaller_ranks(question: Question) -> list[int]:
    adapter = question.spec.adapter
    return [rank for rank in SMALLER_RANKS if rank < adapter.r] if isinstance(adapter, Lora) else []


def _helps(question: Question, changes: Changes) -> bool:
    changed = _changed(question, changes)
    return changed is not None and surely_fits(changed)


def _changed(question: Question, changes: Changes) -> Question | None:
    """None: the changes contradict another setting."""
    try:
        return replace(question, spec=with_changes(question.spec, changes))
    except ValidationError:
        return None
