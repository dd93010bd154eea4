"""Real checkpoints of a training, truncated, flipped, with files removed or exchanged: none of them may be loaded."""

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
from tests.tiny_training import Keeper, Recorder, load, rows, run

LAST, BEFORE = "step-00000012.a1", "step-00000011.a1"


@dataclass(frozen=True)
class Damages:
    """What came of them."""

    damages: int
    loaded: list[str]
    """Damaged checkpoints that were loaded: how they were damaged"""
    not_replaced: list[str]
    """Damages after which the whole checkpoint before was not loaded"""
    kinds: dict[str, int]
    seconds: float


def damage_many(tiny_model: Path, directory: Path, times: int, *, seed: int = 0) -> Damages:
    """Trains twelve steps, and damages the last of the two checkpoints that are kept so many times."""
    started, chance = time.monotonic(), random.Random(seed)
    pristine, damaged = directory / "pristine", directory / "damaged"
    train(tiny_model, pristine)
    assert names(pristine) == [BEFORE, LAST]
    whole = _contents(pristine / LAST)
    loaded, not_replaced, kinds = list[str](), list[str](), Counter[str]()
    while kinds.total() < times:
        shutil.copytree(pristine, damaged)
        damage, file = chance.choice(DAMAGE), chance.choice(sorted((damaged / LAST).iterdir()))
        damage(file, chance)
        # A file that both checkpoints have alike is not damaged by the other's.
        if not (damaged / LAST).exists() or _contents(damaged / LAST) != whole:
            what = f"{damage.__name__} {file.name}"
            kinds[damage.__name__] += 1
            found = Checkpoints(damaged, 9).latest()
            if found is None or found[0].step != 11:
                (not_replaced if found is None else loaded).append(what)
        shutil.rmtree(damaged)
    return Damages(times, loaded, not_replaced, dict(kinds), round(time.monotonic() - started, 1))


def train(tiny_model: Path, directory: Path) -> None:
    """Twelve steps on NF4 with a checkpoint after each; the last two stay."""
    recorder = Recorder()
    keeper = Keeper(Checkpoints(directory, 1), recorder)
    keeper.is_due = True
    training = Training(batch_size=4, learning_rate=1e-2, optim="paged_adamw_8bit", load_best_model_at_end=True)
    model = load(tiny_model, adapter=Lora(r=4, lora_dropout=0.1))
    run(model, rows(16), training, steps=12, recorder=recorder, control=keeper)


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
