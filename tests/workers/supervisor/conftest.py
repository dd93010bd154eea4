"""A running worker that the tests of a file share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workspace import Workspace


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Workspace]:
    """A workspace with a running worker, for tests that leave both as they were, except for an idle trainer."""
    workspace = Workspace(tmp_path_factory.mktemp("served") / "data", tiny_model)
    with workspace.worker(QLORA_CHECKPOINT_S="0"):
        yield workspace
