"""What measured jobs say about predictions: how far off they were, and the room to leave. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

PRIOR = 1.03
"""The simulator is within 1 % of what it simulates and the closed form within 5 % of the simulator, either way: until a
device has shown better, or worse"""
ENOUGH = 20
"""Of so many measurements one in twenty may lie above the 95th percentile; of fewer, the percentile is the largest"""
SHARE = 0.95


@dataclass(frozen=True)
class Distribution:
    """Of actual over predicted: 1 is as predicted, more is more than that."""

    jobs: int
    min: float
    p10: float
    p50: float
    p90: float
    max: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Distribution | None:
        """None of nothing."""
        if not ratios:
            return None
        ordered = sorted(ratios)
        figures = [ordered[0], *(percentile(ordered, share) for share in (0.1, 0.5, 0.9)), ordered[-1]]
        return cls(len(ordered), *(round(figure, 4) for figure in figures))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def margin(ratios: Sequence[float]) -> float:
    """What predicted bytes are multiplied with on a device whose jobs took these shares of what was predicted.

    With few measurements they can only raise it above what is assumed of every device: that nothing has gone wrong yet
    says little. With many it is what 95 of 100 jobs stayed below, so that one freak does not take everybody's memory;
    the job that needs more has its micro-batch halved. Never below 1: predictions are of the largest step that settings
    and rows admit, which a job with short rows does not make, and the next one may.
    """
    if len(ratios) < ENOUGH:
        return max([PRIOR, *ratios])
    return max(1.0, percentile(sorted(ratios), SHARE))


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest of the values that so large a share of them does not exceed (nearest rank)."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
