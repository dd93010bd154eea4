"""torch's CUDA caching allocator, as arithmetic: what it reserves to serve a sequence of allocations.

Its default settings: sizes rounded to 512 bytes; a pool of 2 MiB segments for what is at most 1 MiB, one of 20 MiB
segments for what is below 10 MiB, larger ones of their own in steps of 2 MiB; best fit, blocks split and joined;
nothing given back to the driver. Source: torch 2.13, c10/cuda/CUDACachingAllocator.cpp.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

ROUNDING = 512
SMALL = 2**20
SMALL_SEGMENT = 2 * 2**20
MIDDLE = 10 * 2**20
MIDDLE_SEGMENT = 20 * 2**20
LARGE_STEP = 2 * 2**20

Event = tuple[int, int]
"""An allocation's number and its bytes, negative when they are freed"""


def rounded(size: int, step: int = ROUNDING) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


@dataclass(eq=False)
class _Block:
    """A piece of a segment, between its neighbours."""

    size: int
    small: bool
    number: int
    before: _Block | None = None
    behind: _Block | None = None
    free: bool = False

    @property
    def key(self) -> tuple[int, int]:
        return self.size, self.number


class CachingAllocator:
    """Serves allocations from segments that it keeps."""

    def __init__(self) -> None:
        self.reserved = 0
        self._numbers = count()
        self._used: dict[int, _Block] = {}
        self._free: dict[bool, list[tuple[tuple[int, int], _Block]]] = {True: [], False: []}

    def allocate(self, number: int, size: int) -> None:
        """Serve allocation `number`."""
        size = rounded(size)
        block = self._best_fit(size) or self._new_segment(size)
        rest = block.size - size
        if rest >= (ROUNDING if block.small else SMALL + 1):
            behind = _Block(rest, block.small, next(self._numbers), before=block, behind=block.behind)
            if block.behind is not None:
                block.behind.before = behind
            block.size, block.behind = size, behind
            self._put(behind)
        self._used[number] = block

    def free(self, number: int) -> None:
        """Take allocation `number` back, joined with what is free beside it."""
        block = self._used.pop(number)
        if (behind := block.behind) is not None and behind.free:
            self._take(behind)
            _join(block, behind)
        if (before := block.before) is not None and before.free:
            self._take(before)
            _join(before, block)
            block = before
        self._put(block)

    def _best_fit(self, size: int) -> _Block | None:
        pool = self._free[size <= SMALL]
        index = bisect_left(pool, ((size, -1),))
        if index == len(pool):
            return None
        block = pool.pop(index)[1]
        block.free = False
        return block

    def _new_segment(self, size: int) -> _Block:
        small = size <= SMALL
        middle = MIDDLE_SEGMENT if size < MIDDLE else rounded(size, LARGE_STEP)
        block = _Block(SMALL_SEGMENT if small else middle, small, next(self._numbers))
        self.reserved += block.size
        return block

    def _put(self, block: _Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.key, block))

    def _take(self, block: _Block) -> None:
        pool = self._free[block.small]
        del pool[bisect_left(pool, (block.key,))]
        block.free = False


def _join(left: _Block, right: _Block) -> None:
    left.size, left.behind = left.size + right.size, right.behind
    if right.behind is not None:
        right.behind.before = left


def reserved_bytes(events: Iterable[Event]) -> int:
    """What the allocator holds after the events: it never gives anything back."""
    allocator = CachingAllocator()
    for number, size in events:
        if size > 0:
            allocator.allocate(number, size)
        elif size < 0:
            allocator.free(number)
    return allocator.reserved
