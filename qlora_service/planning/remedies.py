"""Changes that make a job fit: other settings, or the largest length, batch size and model. Pure arithmetic.

Every remedy fits despite the formula's error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from qlora_service.planning.fit import FitQuestion, surely_fits, with_changes
from qlora_service.planning.known_models import KNOWN_MODELS
from qlora_service.specs import Lora

Changes = dict[str, Any]
"""Values by dotted field of the spec, to be set together"""
LENGTH_STEP_TOKENS = 16
"""Proposed lengths are multiples of this"""
SMALLER_RANKS = (64, 32, 16, 8)
LENGTH, RANK = "training.max_seq_len_tokens", "adapter.r"


@dataclass(frozen=True)
class Limits:
    """The largest value of each setting with which the job fits on the device; None: it does not fit with any."""

    max_seq_len_tokens: int | None
    """With all other settings unchanged"""
    batch_size: int | None
    """With all other settings unchanged. Batches are split into micro-batches, so every size fits or none does"""
    model: str | None
    """The largest well-known model with which the job fits unchanged"""


def alternatives(question: FitQuestion) -> list[Changes]:
    """Changes of user settings, each of which alone makes the job fit; else one combination of them that does.

    Empty: no change helps.
    """
    single = list(_single_changes(question))
    ranks = [{RANK: rank} for rank in _smaller_ranks(question)]
    helpful = [changes for changes in single if _helps(question, changes)]
    helpful += [changes for changes in ranks if _helps(question, changes)][:1]
    if (length := longest_fitting_tokens(question)) is not None:
        helpful.append({LENGTH: length})
    if helpful:
        return helpful
    combined: Changes = {}
    for changes in [*single, *ranks[-1:]]:
        combined |= changes
    if not combined or (changed := _changed(question, combined)) is None:
        return []
    if surely_fits(changed):
        return [combined]
    length = longest_fitting_tokens(changed)
    return [] if length is None else [combined | {LENGTH: length}]


def limits(question: FitQuestion) -> Limits:
    """The limits of the device for the job."""
    fitting = [name for name, shape in KNOWN_MODELS.items() if surely_fits(replace(question, shape=shape))]
    return Limits(
        max_seq_len_tokens=longest_fitting_tokens(question),
        batch_size=_largest_batch_size(question),
        model=max(fitting, key=lambda name: KNOWN_MODELS[name].parameters, default=None),
    )


def longest_fitting_tokens(question: FitQuestion) -> int | None:
    """The greatest length, up to the question's, with which the job fits; None when none does."""

    def fits(steps: int) -> bool:
        return surely_fits(replace(question, longest_tokens=steps * LENGTH_STEP_TOKENS))

    steps = _greatest(question.longest_tokens // LENGTH_STEP_TOKENS, fits)
    return None if steps is None else steps * LENGTH_STEP_TOKENS


def _largest_batch_size(question: FitQuestion) -> int | None:
    def fits(size: int) -> bool:
        return _helps(question, {"training.batch_size": size})

    return _greatest(question.spec.training.batch_size, fits)


def _greatest(limit: int, holds: Callable[[int], bool]) -> int | None:
    """The greatest number from 1 to `limit` for which `holds` is true, as it is for all smaller ones."""
    if limit < 1 or not holds(1):
        return None
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _single_changes(question: FitQuestion) -> Iterator[Changes]:
    """Changes that keep rows whole, starting with the one that affects the result least."""
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


def _smaller_ranks(question: FitQuestion) -> list[int]:
    adapter = question.spec.adapter
    return [rank for rank in SMALLER_RANKS if rank < adapter.r] if isinstance(adapter, Lora) else []


def _helps(question: FitQuestion, changes: Changes) -> bool:
    changed = _changed(question, changes)
    return changed is not None and surely_fits(changed)


def _changed(question: FitQuestion, changes: Changes) -> FitQuestion | None:
    """The question with changes to its spec; None when they contradict another setting."""
    try:
        return replace(question, spec=with_changes(question.spec, changes))
    except ValidationError:
        return None
