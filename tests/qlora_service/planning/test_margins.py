from __future__ import annotations

import pytest

from qlora_service.planning.margins import ENOUGH, PRIOR, Distribution, margin, percentile


def test_device_without_measurements_is_given_the_prior() -> None:
    assert margin([]) == PRIOR == 1.03


def test_few_measurements_can_only_raise_the_margin() -> None:
    assert margin([0.8] * (ENOUGH - 1)) == PRIOR
    assert margin([0.8, 1.12]) == 1.12


def test_many_measurements_lower_it_to_what_nineteen_of_twenty_stayed_below() -> None:
    assert margin([0.99 + index / 1000 for index in range(ENOUGH)]) == pytest.approx(1.008)
    assert margin([1.0] * 99 + [1.6]) == 1.0  # one freak


def test_margin_is_never_below_one() -> None:
    assert margin([0.5] * 1000) == 1.0


def test_distribution_is_of_nearest_ranks() -> None:
    found = Distribution.of([index / 100 for index in range(100, 0, -1)])
    assert found == Distribution(jobs=100, min=0.01, p10=0.1, p50=0.5, p90=0.9, max=1.0)
    assert Distribution.of([1.5]) == Distribution(1, 1.5, 1.5, 1.5, 1.5, 1.5)
    assert Distribution.of([]) is None
    assert percentile([1.0, 2.0], 0.5) == 1.0
