"""Damaged checkpoints of a real training: none may be loaded, and the checkpoint before must be loaded instead.

Damages truncate a file, flip its bits, remove it or exchange it.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from qlora_service.specs import Lora, Training
from qlora_service.training.checkpoint.checkpoints import Checkpoints
from tests.qlora_service.training.checkpoint.test_checkpoints import DAMAGE, names
from tests.tiny_training import CheckpointingControl, Recorder, load, rows, run

LAST, BEFORE = "step-00000012.a1", "step-00000011.a1"


@dataclass(frozen=True)
class DamageResult:
    """Outcome of damaged checkpoints."""

    damages: int
    loaded: list[str]
    """Damages with which the checkpoint was loaded"""
    not_replaced: list[str]
    """Damages after which the checkpoint before was not loaded either"""
    kinds: dict[str, int]
    """Number of damages by kind"""
    seconds: float


def damage_many(tiny_model: Path, directory: Path, times: int, *, seed: int = 0) -> DamageResult:
    """Trains twelve steps, and damages a copy of the last checkpoint `times` times; the one before stays intact."""
    started, generator = time.monotonic(), random.Random(seed)
    pristine, damaged = directory / "pristine", directory / "damaged"
    _train(tiny_model, pristine)
    assert names(pristine) == [BEFORE, LAST]
    intact = _contents(pristine / LAST)
    loaded, not_replaced, kinds = list[str](), list[str](), Counter[str]()
    while kinds.total() < times:
        shutil.copytree(pristine, damaged)
        damage, file = generator.choice(DAMAGE), generator.choice(sorted((damaged / LAST).iterdir()))
        damage(file, generator)
        # Exchanging a file that is equal in both checkpoints is no damage.
        if not (damaged / LAST).exists() or _contents(damaged / LAST) != intact:
            description = f"{damage.__name__} {file.name}"
            kinds[damage.__name__] += 1
            latest = Checkpoints(damaged, 9).latest()
            if latest is None or latest[0].step != 11:
                (not_replaced if latest is None else loaded).append(description)
        shutil.rmtree(damaged)
    return DamageResult(times, loaded, not_replaced, dict(kinds), round(time.monotonic() - started, 1))


def _train(tiny_model: Path, directory: Path) -> None:
    """Twelve steps on NF4 with a checkpoint after each; the last two are kept."""
    recorder = Recorder()
    control = CheckpointingControl(Checkpoints(directory, 1), recorder)
    control.is_due = True
    training = Training(batch_size=4, learning_rate=1e-2, optim="paged_adamw_8bit", load_best_model_at_end=True)
    model = load(tiny_model, adapter=Lora(r=4, lora_dropout=0.1))
    run(model, rows(16), training, steps=12, recorder=recorder, control=control)


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
