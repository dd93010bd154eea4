"""Simulated memory against real tensors: the same steps, run on a CPU under the same tracker.

All jobs, and some on SmolLM2: `python -m tests.benchmarks plan`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_service.planning.memory import Category
from tests.planning_tracked import JOBS, TrackedJob, track_real_steps

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", JOBS[::3], ids=lambda case: case.name)
def test_simulated_bytes_equal_those_of_real_tensors(tiny_model: Path, case: TrackedJob) -> None:
    assert abs(case.off_by(tiny_model)) < 0.01


def test_simulated_categories_equal_those_of_real_tensors(tiny_model: Path) -> None:
    case = TrackedJob("LoRA", {}, checkpointing=True)
    simulated, real = case.simulated(tiny_model).categories, track_real_steps(case, tiny_model).at_peak()
    for category in Category:
        assert simulated[category] == pytest.approx(real[category], rel=0.02, abs=512), category
