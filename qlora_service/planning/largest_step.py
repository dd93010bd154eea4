"""The step of a job that needs most memory: the longest rows in the fullest micro-batch. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_service.specs import JobSpec

STEP_FIELDS = {"batch_size", "optim", "neftune_noise_alpha"}
"""Fields of `Training` that time and memory of a step depend on, beside lengths and micro-batch tokens"""
MIN_EXAMPLE_TOKENS = 8
"""The rest of a micro-batch is filled with one more example if it has at least this many tokens"""


@dataclass(frozen=True)
class LargestStep:
    """The largest micro-batch, and whether it is the only one of its step."""

    lengths: tuple[int, ...]
    """Tokens of each document; of a pair, both sides one after the other"""
    documents_per_example: int
    is_whole_step: bool
    """No gradients of an earlier micro-batch exist"""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def largest_step(spec: JobSpec, *, micro_batch_tokens: int, longest_tokens: int) -> LargestStep:
    """The largest step with rows of up to `longest_tokens`; a row longer than a micro-batch is one of its own."""
    sides = 2 if spec.objective.type in {"dpo", "orpo"} else 1
    example_tokens = sides * longest_tokens
    full_examples = min(spec.training.batch_size, max(1, micro_batch_tokens // example_tokens))
    lengths = [longest_tokens] * (sides * full_examples)
    rest = (micro_batch_tokens - full_examples * example_tokens) // sides
    if full_examples < spec.training.batch_size and rest >= MIN_EXAMPLE_TOKENS:
        lengths += [rest] * sides
    return LargestStep(tuple(lengths), sides, len(lengths) // sides == spec.training.batch_size)
