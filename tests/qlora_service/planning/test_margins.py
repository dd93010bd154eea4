from __future__ import annotations

import pytest

from qlora_service.planning.margins import MIN_JOBS_FOR_PERCENTILE, PRIOR_MARGIN, Distribution, margin, percentile


def test_device_without_measurements_has_the_prior_margin() -> None:
    assert margin([]) == PRIOR_MARGIN == 1.03


def test_few_measurements_can_only_raise_the_margin() -> None:
    assert margin([0.8] * (MIN_JOBS_FOR_PERCENTILE - 1)) == PRIOR_MARGIN
    assert margin([0.8, 1.12]) == 1.12


def test_many_measurements_give_the_95th_percentile() -> None:
    assert margin([0.99 + index / 1000 for index in range(MIN_JOBS_FOR_PERCENTILE)]) == pytest.approx(1.008)
    assert margin([1.0] * 99 + [1.6]) == 1.0  # one outlier


def test_margin_is_never_below_one() -> None:
    assert margin([0.5] * 1000) == 1.0


def test_distribution_has_nearest_rank_percentiles() -> None:
    distribution = Distribution.of([index / 100 for index in range(100, 0, -1)])
    assert distribution == Distribution(jobs=100, min=0.01, p10=0.1, p50=0.5, p90=0.9, max=1.0)
    assert Distribution.of([1.5]) == Distribution(1, 1.5, 1.5, 1.5, 1.5, 1.5)
    assert Distribution.of([]) is None
    assert percentile([1.0, 2.0], 0.5) == 1.0
