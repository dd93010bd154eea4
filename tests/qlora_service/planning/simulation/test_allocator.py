"""The model of torch's CUDA caching allocator; the cases apply its documented rules, calculated by hand."""

from __future__ import annotations

import random

from qlora_service.planning.simulation.allocator import CachingAllocator, Event, reserved_bytes

MIB = 2**20


def test_small_allocations_share_a_segment_of_two_mebibytes() -> None:
    assert reserved_bytes([(number, MIB // 4) for number in range(8)]) == 2 * MIB
    assert reserved_bytes([(number, MIB // 4) for number in range(9)]) == 4 * MIB


def test_sizes_are_rounded_to_512_bytes() -> None:
    assert reserved_bytes([(number, 1) for number in range(4096)]) == 2 * MIB
    assert reserved_bytes([(number, 1) for number in range(4097)]) == 4 * MIB


def test_medium_allocations_share_a_segment_of_twenty_mebibytes() -> None:
    assert reserved_bytes([(0, 5 * MIB), (1, 9 * MIB), (2, 6 * MIB)]) == 20 * MIB
    assert reserved_bytes([(0, 5 * MIB), (1, 9 * MIB), (2, 7 * MIB)]) == 40 * MIB


def test_large_allocations_have_segments_of_their_own_in_steps_of_two_mebibytes() -> None:
    assert reserved_bytes([(0, 11 * MIB), (1, 33 * MIB)]) == 12 * MIB + 34 * MIB


def test_freed_blocks_are_reused_and_never_returned_to_the_driver() -> None:
    assert reserved_bytes([(0, 50 * MIB), (0, -50 * MIB)]) == 50 * MIB
    assert reserved_bytes([(0, 50 * MIB), (0, -50 * MIB), (1, 30 * MIB), (2, 20 * MIB)]) == 50 * MIB


def test_smallest_block_that_fits_is_used() -> None:
    freed: list[Event] = [(0, 60 * MIB), (1, 40 * MIB), (0, -60 * MIB), (1, -40 * MIB)]
    assert reserved_bytes([*freed, (2, 40 * MIB), (3, 60 * MIB)]) == 100 * MIB


def test_free_neighbors_are_merged() -> None:
    pieces: list[Event] = [(0, 60 * MIB), (0, -60 * MIB), *((number, 20 * MIB) for number in (1, 2, 3))]
    for order in ((1, 2, 3), (3, 2, 1), (1, 3, 2), (2, 1, 3)):
        freed = [(number, -20 * MIB) for number in order]
        assert reserved_bytes([*pieces, *freed, (4, 60 * MIB)]) == 60 * MIB


def test_gap_between_used_blocks_cannot_serve_a_larger_allocation() -> None:
    pieces: list[Event] = [(0, 60 * MIB), (0, -60 * MIB), *((number, 20 * MIB) for number in (1, 2, 3))]
    assert reserved_bytes([*pieces, (1, -20 * MIB), (3, -20 * MIB), (4, 40 * MIB)]) == 100 * MIB


def test_rest_of_a_large_block_serves_a_large_allocation_but_no_small_one() -> None:
    assert reserved_bytes([(0, 20 * MIB), (0, -20 * MIB), (1, 17 * MIB), (2, 3 * MIB)]) == 20 * MIB
    assert reserved_bytes([(0, 20 * MIB), (0, -20 * MIB), (1, 17 * MIB), (2, MIB)]) == 22 * MIB


def test_blocks_cover_their_segments_after_random_allocations() -> None:
    rng = random.Random(0)
    allocator, live = CachingAllocator(), {}
    peak = 0
    for number in range(3000):
        if live and rng.random() < 0.5:
            number_to_free = rng.choice(sorted(live))
            allocator.free(number_to_free)
            del live[number_to_free]
        else:
            live[number] = int(2 ** rng.uniform(5, 27))
            allocator.allocate(number, live[number])
        peak = max(peak, sum(live.values()))
        assert allocator.reserved >= peak
    for number in sorted(live):
        allocator.free(number)
    # All blocks are free: each segment is one block.
    sizes = [block.size for pool in allocator._free.values() for _, block in pool]
    assert sum(sizes) == allocator.reserved
    assert all(block.previous is None and block.next is None for pool in allocator._free.values() for _, block in pool)
