"""torch's CUDA caching allocator as arithmetic: the bytes that it reserves for a sequence of allocations.

Default settings: sizes rounded to 512 bytes; a pool of 2 MiB segments for sizes up to 1 MiB, one of 20 MiB segments for
sizes below 10 MiB, a segment each for larger ones in steps of 2 MiB; best fit, blocks split and merged; no segment
returned to the driver. Source: torch 2.13, c10/cuda/CUDACachingAllocator.cpp.
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
CUBLAS_WORKSPACE_BYTES = (2 * 4096 + 8 * 16) * 1024
"""Allocated once from torch's allocator, on cards up to Ada (aten/src/ATen/cuda/CublasHandlePool.cpp, 2.13)"""

Event = tuple[int, int]
"""(number of an allocation, its bytes), with negative bytes when it is freed"""


def rounded(size: int, step: int = ROUNDING) -> int:
    """The size rounded up to a multiple of `step`."""
    return -(-size // step) * step


def reserved_bytes(events: Iterable[Event]) -> int:
    """The bytes that the allocator holds after the events, which are also its peak."""
    allocator = CachingAllocator()
    for number, size in events:
        if size > 0:
            allocator.allocate(number, size)
        elif size < 0:
            allocator.free(number)
    return allocator.reserved


@dataclass(eq=False)
class _Block:
    """A piece of a segment, linked to its neighbors."""

    size: int
    small: bool
    number: int
    previous: _Block | None = None
    next: _Block | None = None
    free: bool = False

    @property
    def key(self) -> tuple[int, int]:
        return self.size, self.number


class CachingAllocator:
    """Serves allocations from segments, which it never returns."""

    def __init__(self) -> None:
        self.reserved = 0
        self._block_numbers = count()
        self._used: dict[int, _Block] = {}
        self._free: dict[bool, list[tuple[tuple[int, int], _Block]]] = {True: [], False: []}

    def allocate(self, number: int, size: int) -> None:
        """Serves allocation `number`."""
        size = rounded(size)
        block = self._best_fit(size) or self._new_segment(size)
        rest = block.size - size
        if rest >= (ROUNDING if block.small else SMALL + 1):
            remainder = _Block(rest, block.small, next(self._block_numbers), previous=block, next=block.next)
            if block.next is not None:
                block.next.previous = remainder
            block.size, block.next = size, remainder
            self._add_free(remainder)
        self._used[number] = block

    def free(self, number: int) -> None:
        """Frees allocation `number`, and merges its block with free neighbors."""
        block = self._used.pop(number)
        if (following := block.next) is not None and following.free:
            self._remove_free(following)
            _merge(block, following)
        if (previous := block.previous) is not None and previous.free:
            self._remove_free(previous)
            _merge(previous, block)
            block = previous
        self._add_free(block)

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
        large_segment = MIDDLE_SEGMENT if size < MIDDLE else rounded(size, LARGE_STEP)
        block = _Block(SMALL_SEGMENT if small else large_segment, small, next(self._block_numbers))
        self.reserved += block.size
        return block

    def _add_free(self, block: _Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.key, block))

    def _remove_free(self, block: _Block) -> None:
        pool = self._free[block.small]
        del pool[bisect_left(pool, (block.key,))]
        block.free = False


def _merge(left: _Block, right: _Block) -> None:
    left.size, left.next = left.size + right.size, right.next
    if right.next is not None:
        right.next.previous = left
