"""Fixtures for the tests of the renderer."""

from __future__ import annotations

import pytest

from qlora_service.data.rendering import renderer


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of at most 200 characters, so that short texts are handled as very long ones."""
    monkeypatch.setattr(renderer, "BATCH_CHARS", 200)
