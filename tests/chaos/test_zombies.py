from __future__ import annotations

from tests.chaos import zombies
from tests.workspace import Workspace


def test_twenty_zombies_write_nothing_and_are_soon_gone(workspace: Workspace) -> None:
    found = zombies.run(workspace, 20)
    assert found.writes_accepted == []
    assert found.gone_s <= zombies.GONE_WITHIN_S
    assert found.zombies >= 20
    assert found.unaware >= 5
