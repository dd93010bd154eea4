from __future__ import annotations

import pytest

from tests.chaos import random_kills
from tests.workspace import Workspace


@pytest.mark.timeout(900)
def test_a_hundred_random_kills_lose_no_job_and_change_no_adapter(workspace: Workspace) -> None:
    survival = random_kills.run(workspace, 100, seed=1)
    assert (survival.lost, survival.stuck, survival.published_twice, survival.wrong) == ([], [], [], [])
    assert max(survival.respawn_s) <= 3
    # Otherwise nothing was tested.
    assert sum(survival.kills.values()) == 100
    assert survival.jobs >= 4
    assert len(survival.kills_by_phase) >= 3
