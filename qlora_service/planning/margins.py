"""Distribution of observed over predicted figures, and the safety margin that follows from it. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

PRIOR_MARGIN = 1.03
"""Margin of a device without measurements: the simulator is within 1 % of the tensors that it simulates, and the closed
form within 5 % of the simulator, in either direction"""
MIN_JOBS_FOR_PERCENTILE = 20
"""With 20 measurements, one may lie above the 95th percentile; with fewer, the percentile is the maximum"""
COVERED_SHARE = 0.95


@dataclass(frozen=True)
class Distribution:
    """Percentiles of observed over predicted: 1 is as predicted, above 1 is more than predicted."""

    jobs: int
    min: float
    p10: float
    p50: float
    p90: float
    max: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Distribution | None:
        """The distribution of the ratios; None when there are none."""
        if not ratios:
            return None
        ordered = sorted(ratios)
        figures = [ordered[0], *(percentile(ordered, share) for share in (0.1, 0.5, 0.9)), ordered[-1]]
        return cls(len(ordered), *(round(figure, 4) for figure in figures))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def margin(ratios: Sequence[float]) -> float:
    """The factor on predicted bytes for a device whose jobs had these ratios of observed over predicted bytes.

    Few measurements can only raise the factor above the prior, because a few jobs without an error prove little. Many
    measurements give the factor that 95 of 100 jobs stayed below, so that one outlier does not reserve memory for every
    job; a job that needs more has its micro-batch halved. The factor is never below 1: predictions are for the largest
    step that settings and rows allow, which a job with short rows does not reach, but the next job may.
    """
    if len(ratios) < MIN_JOBS_FOR_PERCENTILE:
        return max([PRIOR_MARGIN, *ratios])
    return max(1.0, percentile(sorted(ratios), COVERED_SHARE))


def percentile(ordered: Sequence[float], share: float) -> float:
    """The nearest-rank percentile: the smallest of the sorted values that at least a `share` of them do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
