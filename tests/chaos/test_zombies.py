from __future__ import annotations

from tests.chaos import zombies
from tests.workspace import Workspace


def test_no_write_of_twenty_zombies_is_accepted_and_they_exit_soon(workspace: Workspace) -> None:
    result = zombies.run(workspace, 20)
    assert result.writes_accepted == []
    assert result.gone_s <= zombies.GONE_WITHIN_S
    assert result.zombies >= 20
    assert result.unaware >= 5
