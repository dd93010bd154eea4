"""Time before the first step with a base that is quantized, read from the cache, or already loaded.

SmolLM2-135M-Instruct in NF4 with double quantization, bf16 compute, on a CPU. The first part loads the base in one
process, quantized and from the cache in turn, the order reversed in every second round; the files are in the page cache
and the libraries imported. Writing the cache counts for the first load only, which has its own figure. The second part
measures jobs of a real worker from the claim to the first micro-batch, which is that of the evaluation before step 1.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import structlog
import torch
from transformers.utils.logging import disable_progress_bar

from qlora_service.cli.demo import ensure_smollm2
from qlora_service.domain.jobs import JobStatus
from qlora_service.models.base.load import LoadedBase, load_cached_base
from qlora_service.models.base.quantize import base_fingerprint
from qlora_service.models.base.quantized_cache import QuantizedCache
from qlora_service.models.catalog.catalog import BaseModel
from qlora_service.specs import Quantization
from tests.benchmarks._workload import ROOT
from tests.workspace import Workspace

ROUNDS = 5
UNLIMITED = 2**40


def figures() -> Iterator[dict[str, Any]]:
    disable_progress_bar()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    base = ensure_smollm2(ROOT / ".cache" / "tests" / "models", ROOT / ".cache" / "demo", lambda text: None)
    # Not /tmp, which may be in memory.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        cache = QuantizedCache(Path(directory), UNLIMITED)
        first_s, first = _timed(cache, base)
        cold, cached = _measure(cache, base)
        size = cache.entries()[0].size_bytes
        same = base_fingerprint(_load(cache, base).model) == base_fingerprint(first.model)
    ratio = round(statistics.median(cold) / statistics.median(cached), 1)
    yield {"figure": "quantizing over cached load", "value": ratio, "unit": "x", "must": 4, "better": "higher"}
    yield {"figure": "cached base has the same logits", "value": int(same), "unit": "", "must": 1, "better": "higher"}
    yield _figure("load, quantizing", statistics.median(cold), "s")
    yield _figure("load, quantizing and writing the cache", first_s, "s")
    yield _figure("load, cached and verified", statistics.median(cached), "s")
    yield _figure("quantized base on disk", size / 1e6, "MB")
    yield from _claims(base)


def _claims(base: BaseModel) -> Iterator[dict[str, Any]]:
    """Figures of a worker's jobs with a quantized, a cached and a loaded base; all jobs have the same adapter."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        workspace = Workspace(Path(directory) / "data", base.path)
        with workspace.worker():
            cold = _job(workspace)
        with workspace.worker():
            jobs = {"cold": cold, "cached": _job(workspace)}
            warm = [_job(workspace) for _ in range(ROUNDS)]
        adapters = {workspace.adapter_sha256(job_id) for job_id in (*jobs.values(), *warm)}
        for name, job_id in jobs.items():
            seconds, import_s = _seconds_from_claim(workspace, job_id)
            yield _figure(f"claim to first micro-batch, {name}", seconds, "s")
            yield _figure(f"claim to first micro-batch, {name}: until torch was imported", import_s, "s")
        seconds = statistics.median(_seconds_from_claim(workspace, job_id)[0] for job_id in warm)
        yield _figure("claim to first micro-batch, warm", seconds, "s") | {"must": 1.0}
        yield {"figure": "different adapters", "value": len(adapters), "unit": "", "must": 1, "better": "lower"}


def _job(workspace: Workspace) -> str:
    """Runs a job until it has succeeded, and returns its id."""
    job_id = workspace.submit(micro_batch_tokens=256)
    assert workspace.wait(job_id, lambda job: job.status.terminal, limit_s=600).status is JobStatus.SUCCEEDED
    return job_id


def _seconds_from_claim(workspace: Workspace, job_id: str) -> tuple[float, float]:
    """Seconds from the claim to the first micro-batch, and from the claim to the start of rendering."""
    times = {
        event.data.get("message") or event.data.get("status"): event.at
        for event in workspace.service.jobs.events(job_id)
    }
    claimed = times[JobStatus.RUNNING]
    return (times["training"] - claimed).total_seconds(), (times["rendering"] - claimed).total_seconds()


def _measure(cache: QuantizedCache, base: BaseModel) -> tuple[list[float], list[float]]:
    """Seconds of every load without the cache, and with it."""
    cold: list[float] = []
    cached: list[float] = []
    for index in range(ROUNDS):
        for used_cache in (None, cache) if index % 2 == 0 else (cache, None):
            seconds, loaded = _timed(used_cache, base)
            assert loaded.source == ("quantized" if used_cache is None else "cached")
            (cold if used_cache is None else cached).append(seconds)
    return cold, cached


def _timed(cache: QuantizedCache | None, base: BaseModel) -> tuple[float, LoadedBase]:
    started = time.perf_counter()
    loaded = _load(cache, base)
    return time.perf_counter() - started, loaded


def _load(cache: QuantizedCache | None, base: BaseModel) -> LoadedBase:
    return load_cached_base(cache, base, Quantization(), torch.bfloat16, torch.device("cpu"))


def _figure(name: str, value: float, unit: str) -> dict[str, Any]:
    return {"figure": name, "value": round(value, 3), "unit": unit, "must": None, "better": "lower"}
