"""The short form of `make chaos`: real processes, real signals, real files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import random_kills, resume_every_step, sigterm, zombies
from tests.chaos.damaged_checkpoints import damage_many
from tests.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path, tiny_model: Path) -> Workspace:
    return Workspace(tmp_path / "data", tiny_model)


@pytest.mark.timeout(900)
def test_a_hundred_random_kills_lose_no_job_and_change_no_adapter(workspace: Workspace) -> None:
    survival = random_kills.run(workspace, 100, seed=1)
    assert (survival.lost, survival.stuck, survival.published_twice, survival.wrong) == ([], [], [], [])
    assert max(survival.respawn_s) <= 3
    # Otherwise nothing was tested.
    assert sum(survival.kills.values()) == 100
    assert survival.jobs >= 4
    assert len(survival.kills_by_phase) >= 3


def test_a_job_killed_after_any_step_ends_with_the_same_adapter(workspace: Workspace) -> None:
    resumed = resume_every_step.run(workspace, 6)
    assert resumed.wrong == []
    assert resumed.adapters == {"paged_adamw_32bit": 1, "paged_adamw_8bit": 1}
    assert resumed.resumed == 12


def test_a_stopped_worker_loses_no_completed_step_and_is_soon_gone(workspace: Workspace) -> None:
    stops = sigterm.run(workspace, 3)
    assert stops.wrong == []
    assert stops.lost_steps == 0
    assert max(stops.exit_s) <= 8
    assert stops.trainers >= 4


def test_twenty_zombies_write_nothing_and_are_soon_gone(workspace: Workspace) -> None:
    found = zombies.run(workspace, 20)
    assert found.writes_accepted == []
    assert found.gone_s <= zombies.GONE_WITHIN_S
    assert found.zombies >= 20
    assert found.unaware >= 5


def test_no_damaged_checkpoint_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    found = damage_many(tiny_model, tmp_path, 200)
    assert (found.loaded, found.not_replaced) == ([], [])
    assert len(found.kinds) >= 6
