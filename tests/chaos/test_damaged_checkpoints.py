from __future__ import annotations

from pathlib import Path

from tests.chaos.damaged_checkpoints import damage_many


def test_no_damaged_checkpoint_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    result = damage_many(tiny_model, tmp_path, 200)
    assert (result.loaded, result.not_replaced) == ([], [])
    assert len(result.kinds) >= 6
