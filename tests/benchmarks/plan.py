"""Accuracy of the memory plan against published GPU figures, and of the formula against the simulator; its time."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_service.cli.demo import ensure_smollm2
from tests.planning_models import Case, cases
from tests.planning_published import ROWS, emulated_bytes
from tests.planning_tracked import JOBS, TrackedJob
from tests.tiny_model import build_tiny_model
from tests.workspace import ROOT

CACHE = ROOT / ".cache"
SMOLLM2_JOBS = [
    TrackedJob("LoRA in bfloat16", {}, 256, 128, compute_dtype="bfloat16"),
    TrackedJob("recomputed, AdamW in 8 bits", {"training": {"optim": "adamw_8bit"}}, 256, 200, checkpointing=True),
    TrackedJob("DPO, dropout", {"adapter": {"lora_dropout": 0.1}, "objective": {"type": "dpo"}}, 128, 64),
    TrackedJob("one long row, int8", {"quantization": {"type": "int8"}, "training": {"batch_size": 1}}, 64, 512),
]
ROUNDS = 3
FORMULA_ROUNDS = 200


def figures() -> Iterator[dict[str, Any]]:
    for row in ROWS:
        error = 100 * (emulated_bytes(row) / row.bytes - 1)
        yield _figure(f"emulated, {row.name}: off by", round(error, 2), "%", 2)
    yield from _tracked()
    yield from _formula()
    yield from _time()


def _tracked() -> Iterator[dict[str, Any]]:
    """Errors of the simulation against real steps on a CPU, of the tiny model and of SmolLM2."""
    worst = 0.0
    with tempfile.TemporaryDirectory() as directory:
        tiny = build_tiny_model(Path(directory) / "tiny")
        smollm2 = ensure_smollm2(CACHE / "tests" / "models", CACHE / "demo").path
        for name, model, jobs in (("tiny", tiny, JOBS), ("SmolLM2-135M", smollm2, SMOLLM2_JOBS)):
            for job in jobs:
                error = 100 * job.off_by(model)
                worst = max(worst, abs(error))
                yield _figure(f"simulated, {name}, {job.name}: off by", round(error, 3), "%", 1)
    yield _figure("simulated, worst", round(worst, 3), "%", 1)


def _formula() -> Iterator[dict[str, Any]]:
    """Errors of the formula against the simulation: every case, and the worst."""
    worst = 0.0
    for case in cases():
        simulated, estimated = case.simulated(), case.estimated()
        error = 100 * (estimated.allocated / simulated.allocated - 1)
        reserved_error = 100 * (estimated.reserved / simulated.reserved - 1)
        worst = max(worst, abs(error))
        yield _figure(f"formula, {case}: off by", round(error, 2), "%", 5) | {
            "simulated_bytes": simulated.allocated,
            "reserved_off": round(reserved_error, 1),
        }
    yield _figure("formula, worst", round(worst, 2), "%", 5)


def _time() -> Iterator[dict[str, Any]]:
    """Time on one core of the simulation with the start of its process, and of the formula."""
    case = Case("Llama-2-7B")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        case.simulated_by_child()
        seconds.append(time.perf_counter() - started)
    yield _figure("7B plan, simulated", round(min(seconds), 2), "s", 8)
    started = time.perf_counter()
    for _ in range(FORMULA_ROUNDS):
        case.estimated()
    yield _figure("7B plan, formula", round(1000 * (time.perf_counter() - started) / FORMULA_ROUNDS, 3), "ms", 10)


def _figure(name: str, value: float, unit: str, must: float) -> dict[str, Any]:
    return {"figure": name, "value": value, "unit": unit, "must": must, "better": "lower"}
