"""How near the memory plan comes: to GPUs that others measured, and the formula to the simulator; how long it takes."""

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
INSTANT_ROUNDS = 200


def figures() -> Iterator[dict[str, Any]]:
    for row in ROWS:
        off = 100 * (emulated_bytes(row) / row.bytes - 1)
        yield _told(f"emulated, {row.name}: off by", round(off, 2), "%", 2)
    yield from _tracked()
    yield from _formula()
    yield from _time()


def _tracked() -> Iterator[dict[str, Any]]:
    """Jobs really done on a CPU: the tiny model, and SmolLM2."""
    worst = 0.0
    with tempfile.TemporaryDirectory() as directory:
        tiny = build_tiny_model(Path(directory) / "tiny")
        smollm2 = ensure_smollm2(CACHE / "tests" / "models", CACHE / "demo").path
        for name, model, jobs in (("tiny", tiny, JOBS), ("SmolLM2-135M", smollm2, SMOLLM2_JOBS)):
            for job in jobs:
                off = 100 * job.off_by(model)
                worst = max(worst, abs(off))
                yield _told(f"simulated, {name}, {job.name}: off by", round(off, 3), "%", 1)
    yield _told("simulated, worst", round(worst, 3), "%", 1)


def _formula() -> Iterator[dict[str, Any]]:
    """Every case, and the worst."""
    worst = 0.0
    for case in cases():
        simulated, estimated = case.simulated(), case.estimated()
        off = 100 * (estimated.allocated / simulated.allocated - 1)
        reserved = 100 * (estimated.reserved / simulated.reserved - 1)
        worst = max(worst, abs(off))
        yield _told(f"formula, {case}: off by", round(off, 2), "%", 5) | {
            "simulated_bytes": simulated.allocated,
            "reserved_off": round(reserved, 1),
        }
    yield _told("formula, worst", round(worst, 2), "%", 5)


def _time() -> Iterator[dict[str, Any]]:
    """One core: the simulation with its process, start to end; the formula alone."""
    case = Case("Llama-2-7B")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        case.simulated_by_child()
        seconds.append(time.perf_counter() - started)
    yield _told("7B plan, simulated", round(min(seconds), 2), "s", 8)
    started = time.perf_counter()
    for _ in range(INSTANT_ROUNDS):
        case.estimated()
    yield _told("7B plan, formula", round(1000 * (time.perf_counter() - started) / INSTANT_ROUNDS, 3), "ms", 10)


def _told(name: str, value: float, unit: str, must: float) -> dict[str, Any]:
    return {"figure": name, "value": value, "unit": unit, "must": must, "better": "lower"}
