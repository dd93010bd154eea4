"""Cost of checkpoints: snapshot, serialization, SHA-256, write and flush, as a share of the training time.

All of their time counts, as if the thread that writes them had no core of its own. The state has the size of
SmolLM2-135M with LoRA of rank 16 on all linear layers, 32-bit AdamW, and the best adapter so far.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qlora_service.settings import Settings
from qlora_service.training.checkpoint.checkpoints import Checkpoints
from qlora_service.training.checkpoint.state import StepHistory, TrainingState, random_state
from qlora_service.training.evaluation.held_out import HeldOutState
from qlora_service.training.evaluation.row_losses import RowLosses

PARAMETERS, TENSORS = 4_884_480, 420
"""LoRA of rank 16 on 30 layers with seven linear modules, two matrices each"""
ROUNDS = 7


def figures() -> Iterator[dict[str, Any]]:
    every_s = Settings().checkpoint_s
    # Not /tmp, which may be in memory.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        seconds, size = _measure(Path(directory))
    name = f"cost of checkpoints, one every {every_s:g} s, {PARAMETERS / 1e6:.1f} M parameters"
    yield {"figure": name, "value": round(100 * seconds / every_s, 2), "unit": "%", "must": 2, "better": "lower"}
    yield _figure("one checkpoint, start to flushed", round(seconds, 3), "s")
    yield _figure("one checkpoint on disk", round(size / 1e6, 1), "MB")


def _measure(directory: Path) -> tuple[float, int]:
    """Median seconds per checkpoint, and its bytes."""
    checkpoints = Checkpoints(directory, token=1)
    live, seconds = _state(), []
    for step in range(1, ROUNDS + 1):
        started = time.perf_counter()
        state = replace(
            live,
            history=StepHistory(step=step),
            parameters={name: value.clone() for name, value in live.parameters.items()},
            optimizer={
                name: {key: value.clone() for key, value in moments.items()} for name, moments in live.optimizer.items()
            },
            # The worst case: every checkpoint has a new best adapter, so none can be linked from the one before.
            held_out=HeldOutState(best_weights={name: value + step for name, value in live.parameters.items()}),
        )
        checkpoints.save(state, b"{}\n" * step, {"threads": torch.get_num_threads()})
        checkpoints.flush()
        seconds.append(time.perf_counter() - started)
    newest = max(directory.glob("step-*"))
    return statistics.median(seconds), sum(path.stat().st_size for path in newest.iterdir())


def _state() -> TrainingState:
    """A state of random values in the real layout."""
    parameters = {f"layer.{index}.weight": torch.randn(PARAMETERS // TENSORS) for index in range(TENSORS)}
    moments = {
        name: {"state1": torch.randn_like(value), "state2": torch.rand_like(value), "step": torch.tensor(1)}
        for name, value in parameters.items()
    }
    return TrainingState(
        history=StepHistory(),
        parameters=parameters,
        optimizer=moments,
        allocation={},
        held_out=HeldOutState(),
        row_losses=RowLosses().state(),
        random_state=random_state(torch.device("cpu")),
        micro_batch_tokens=2048,
        gradient_checkpointing=False,
    )


def _figure(name: str, value: float, unit: str) -> dict[str, Any]:
    return {"figure": name, "value": value, "unit": unit, "must": None, "better": "lower"}
