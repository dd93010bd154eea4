"""Data order: held-out split, the examples of each step, and packing into micro-batches. Pure arithmetic on lengths.

The order is a function of (seed, epoch), never of an iterator's state, so that the rows of any step can be recomputed.
"""

from __future__ import annotations

import math
import random
from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Split:
    """Positions of the training rows and of the held-out rows."""

    train: tuple[int, ...]
    held_out: tuple[int, ...]


def split_rows(rows: int, fraction: float, max_held_out: int, seed: int) -> Split:
    """A random split with at least one training row, and at least one held-out row if `fraction` is above 0.

    Raises:
        ValueError: no rows, or too few to hold one out.
    """
    if rows < 1:
        raise ValueError("there are no rows to train on")
    if fraction > 0 and rows < 2:
        raise ValueError(f"one row is too few to hold out {fraction:.0%}: add rows or set validation.fraction to 0")
    held_out = min(max_held_out, max(1, round(rows * fraction)), rows - 1) if fraction > 0 else 0
    order = list(range(rows))
    random.Random(f"split {seed}").shuffle(order)  # noqa: S311 - not a secret
    return Split(tuple(sorted(order[held_out:])), tuple(sorted(order[:held_out])))


def sample_rows(rows: int, limit: int, seed: int) -> tuple[int, ...]:
    """Positions of at most `limit` random rows, in ascending order.

    Raises:
        ValueError: no rows.
    """
    if rows < 1:
        raise ValueError("there are no rows to hold out")
    return tuple(sorted(random.Random(f"sample {seed}").sample(range(rows), min(rows, limit))))  # noqa: S311 - no secret


def total_steps(rows: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a job over `rows` training rows."""
    return max_steps if max_steps is not None else math.ceil(_total_examples(rows, epochs) / batch_size)


def step_rows(step: int, rows: int, batch_size: int, epochs: float, max_steps: int | None, seed: int) -> list[int]:
    """Positions of the examples of step `step` (from 0).

    Each epoch is a permutation of the rows; a step may span two epochs. Every step has `batch_size` examples, except
    the last step of a job without `max_steps`, which ends with the last epoch.
    """
    first, end = step * batch_size, (step + 1) * batch_size
    if max_steps is None:
        end = min(end, _total_examples(rows, epochs))
    places = (divmod(position, rows) for position in range(first, end))
    return [_epoch_order(rows, seed, epoch)[place] for epoch, place in places]


def pack(lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Positions grouped into micro-batches of at most `budget_tokens` tokens, without padding.

    Best-fit decreasing: the longest example first, each into the micro-batch where it leaves the least room. The result
    is at most 11/9 of the fewest possible micro-batches plus one (Johnson et al. 1974, doi:10.1137/0203025). An example
    longer than the budget gets its own micro-batch. Deterministic.
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[position]
        tightest = bisect_left(free, (length, 0))
        if tightest < len(free):
            room, index = free.pop(tightest)
        else:
            room, index = budget_tokens, len(bins)
            bins.append([])
        bins[index].append(position)
        insort(free, (room - length, index))
    return bins


@lru_cache(maxsize=2)
def _epoch_order(rows: int, seed: int, epoch: int) -> array[int]:
    """The epoch's permutation; cached for the next step, because shuffling a million rows takes a second."""
    order = array("Q", range(rows))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)  # noqa: S311
    return order


def _total_examples(rows: int, epochs: float) -> int:
    """Number of examples that a job without `max_steps` trains on; at least one."""
    return max(1, round(rows * epochs))
