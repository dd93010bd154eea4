from __future__ import annotations

from tests.chaos import sigterm
from tests.workspace import Workspace


def test_a_stopped_worker_loses_no_completed_step_and_exits_soon(workspace: Workspace) -> None:
    stops = sigterm.run(workspace, 3)
    assert stops.wrong == []
    assert stops.lost_steps == 0
    assert max(stops.exit_s) <= 8
    assert stops.trainers >= 4
