"""Which examples make which step, and how a step is cut into micro-batches. Pure arithmetic on lengths.

The data order is a function of (seed, epoch), never of an iterator's state: any step can be found again.
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
    """Positions of the rows that are trained on and of those held out."""

    train: tuple[int, ...]
    held_out: tuple[int, ...]


def split_rows(rows: int, fraction: float, max_held_out: int, seed: int) -> Split:
    """A random split; at least one row is held out when `fraction` is above 0, and at least one is trained on.

    Raises:
        ValueError: no rows, or too few to hold one out.
    """
    if rows < 1:
        raise ValueError("there are no rows to train on")
    if fraction > 0 and rows < 2:
        raise ValueError(f"one row is too few to hold out {fraction:.0%}: add rows or set validation.fraction to 0")
    held = min(max_held_out, max(1, round(rows * fraction)), rows - 1) if fraction > 0 else 0
    order = list(range(rows))
    random.Random(f"split {seed}").shuffle(order)  # noqa: S311 - not a secret
    return Split(tuple(sorted(order[held:])), tuple(sorted(order[:held])))


def sample_rows(rows: int, limit: int, seed: int) -> tuple[int, ...]:
    """Positions of at most `limit` of the rows, at random, in order.

    Raises:
        ValueError: no rows.
    """
    if rows < 1:
        raise ValueError("there are no rows to hold out")
    return tuple(sorted(random.Random(f"sample {seed}").sample(range(rows), min(rows, limit))))  # noqa: S311 - no secret


def total_steps(rows: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a job over `rows` training rows."""
    return max_steps if max_steps is not None else math.ceil(_examples(rows, epochs) / batch_size)


def step_rows(step: int, rows: int, batch_size: int, epochs: float, max_steps: int | None, seed: int) -> list[int]:
    """Positions of the examples of step `step` (from 0).

    Each epoch is a permutation of the rows; steps run on through epoch boundaries. Every step has `batch_size`
    examples, but the last of a job counted in epochs, which ends where the epochs end.
    """
    first, last = step * batch_size, (step + 1) * batch_size
    if max_steps is None:
        last = min(last, _examples(rows, epochs))
    places = (divmod(position, rows) for position in range(first, last))
    return [_epoch_order(rows, seed, epoch)[place] for epoch, place in places]


@lru_cache(maxsize=2)
def _epoch_order(rows: int, seed: int, epoch: int) -> array[int]:
    """The epoch's permutation; kept for its next step, because a million rows take a second to shuffle."""
    order = array("Q", range(rows))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)  # noqa: S311
    return order


def _examples(rows: int, epochs: float) -> int:
    """Examples that a job counted in epochs trains on; at least one."""
    return max(1, round(rows * epochs))


def pack(lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Positions grouped into micro-batches of at most `budget_tokens` tokens, no padding.

    Best-fit decreasing: the longest first, each where the least room is left over; at most 11/9 of the fewest possible
    micro-batches and one more (Johnson et al. 1974, doi:10.1137/0203025). An example longer than the budget gets a
    micro-batch of its own. Deterministic.
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[position]
        place = bisect_left(free, (length, 0))
        if place < len(free):
            room, index = free.pop(place)
        else:
            room, index = budget_tokens, len(bins)
            bins.append([])
        bins[index].append(position)
        insort(free, (room - length, index))
    return bins
