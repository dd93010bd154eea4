"""Which step of a job needs most memory: the longest rows, packed as full as they go. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_service.specs import JobSpec

SHORTEST_EXAMPLE = 8
"""Tokens; what is left of a budget is filled with one more example, if it is at least as long"""


@dataclass(frozen=True)
class LargestStep:
    """The micro-batch to look at, and whether it is the only one of its step."""

    lengths: tuple[int, ...]
    """Tokens of each document; of a pair, both sides one after the other"""
    documents_per_example: int
    is_whole_step: bool
    """Without gradients of an earlier micro-batch"""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def largest_step(spec: JobSpec, *, micro_batch_tokens: int, longest_tokens: int) -> LargestStep:
    """Of rows of `longest_tokens` at most, cut by the budget; a row longer than that makes a micro-batch of its own."""
    sides = 2 if spec.objective.type in {"dpo", "orpo"} else 1
    size = sides * longest_tokens
    whole = min(spec.training.batch_size, max(1, micro_batch_tokens // size))
    lengths = [longest_tokens] * (sides * whole)
    rest = (micro_batch_tokens - whole * size) // sides
    if whole < spec.training.batch_size and rest >= SHORTEST_EXAMPLE:
        lengths += [rest] * sides
    return LargestStep(tuple(lengths), sides, len(lengths) // sides == spec.training.batch_size)
