"""The tracker's figures, on real tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_service.planning.memory import Category
from qlora_service.planning.simulation.tracker import Tracker

KIB = 1024


def kib(number: int) -> torch.Tensor:
    return torch.zeros(number * KIB, dtype=torch.uint8)


def test_peak_is_the_maximum_of_live_bytes() -> None:
    tracker = Tracker()
    with tracker:
        first = kib(3)
        second = kib(4)
        del first
        third = kib(2)
        assert tracker.peak == 7 * KIB
        fourth = kib(2)
    assert tracker.peak == 8 * KIB
    del second, third, fourth
    assert tracker.peak == 8 * KIB


def test_views_and_in_place_operations_allocate_nothing() -> None:
    tracker = Tracker()
    with tracker:
        whole = kib(4)
        part = whole[: 2 * KIB].view(2, KIB)
        part.add_(1)
        del whole
    assert tracker.peak == 4 * KIB


def test_meta_tensors_count_like_real_ones() -> None:
    tracker = Tracker(rounding=512)
    with tracker:
        kept = torch.empty(1000, 1000, device="meta") @ torch.empty(1000, 10, device="meta")
    assert kept.is_meta
    assert tracker.peak == 4_000_256 + 40_448 + 40_448


def test_allocations_in_the_backward_pass_count_as_recomputation() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    weight.register_post_accumulate_grad_hook(lambda p: tracker.register(p.grad, Category.GRADIENTS))
    tracker = Tracker()
    tracker.register(weight, Category.ADAPTER)
    with tracker:
        hidden = torch.ones(8, 64) @ weight
        loss = hidden.square().sum()
        loss.backward()
        at_peak = tracker.at_peak()
    assert at_peak[Category.ADAPTER] == at_peak[Category.GRADIENTS] == weight.nbytes
    assert at_peak[Category.ACTIVATIONS] >= 2 * hidden.nbytes
    assert at_peak[Category.RECOMPUTATION] >= hidden.nbytes


def test_logits_are_recognized_by_their_columns() -> None:
    tracker = Tracker(vocabulary=100)
    with tracker, tracker.during(Category.OPTIMIZER):
        logits, other = torch.ones(4, 100), torch.ones(4, 99)
    at_peak = tracker.at_peak()
    assert (at_peak[Category.LOGITS], at_peak[Category.OPTIMIZER]) == (logits.nbytes, other.nbytes)


def test_workspace_counts_while_its_kernel_runs() -> None:
    def size(args: Any) -> int:
        return 10 * KIB

    tracker = Tracker(workspaces={"aten::mm": (Category.WORKSPACE, size)})
    one = torch.ones(4, 4)
    with tracker:
        product = one @ one
        after = kib(1)
    at_peak = tracker.at_peak()
    assert at_peak[Category.WORKSPACE] == 10 * KIB
    assert sum(at_peak.values()) == 10 * KIB + product.nbytes
    assert after.nbytes == KIB


def test_reserved_bytes_are_those_of_the_caching_allocator() -> None:
    tracker = Tracker(rounding=512)
    with tracker:
        kept = [kib(1) for _ in range(3)]
    assert tracker.reserved() == 2 * 2**20
    assert len(kept) == 3


@pytest.mark.parametrize("again", [False, True])
def test_registered_tensor_is_counted_once(again: bool) -> None:
    tracker, tensor = Tracker(), kib(5)
    tracker.register(tensor, Category.UNQUANTIZED)
    if again:
        tracker.register(tensor.view(5, KIB), Category.ADAPTER)
    category = Category.ADAPTER if again else Category.UNQUANTIZED
    assert {name: size for name, size in tracker.at_peak().items() if size} == {category: 5 * KIB}
