"""A copy of the tiny model that a test may modify."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def model_directory(tiny_model: Path, tmp_path: Path) -> Path:
    """A fresh copy of the tiny model's directory."""
    return Path(shutil.copytree(tiny_model, tmp_path / "source"))
