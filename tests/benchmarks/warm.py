"""What comes before the first step: the base quantized anew, against the same base from the cache.

SmolLM2-135M-Instruct in NF4 with double quantization, bf16 compute, on a CPU. Both ways are timed in one process, in
turn, the order reversed every round; the files are in the page cache, the libraries imported. What is written for the
cache is paid by the first load only, and shown by itself.
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
from qlora_service.models.cached_base import LoadedBase, load_cached_base
from qlora_service.models.catalog import BaseModel
from qlora_service.models.nf4 import base_fingerprint
from qlora_service.models.quantized_cache import QuantizedCache
from qlora_service.specs import Quantization
from tests.benchmarks._workload import ROOT

ROUNDS = 5
UNLIMITED = 2**40


def figures() -> Iterator[dict[str, Any]]:
    disable_progress_bar()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    base = ensure_smollm2(ROOT / ".cache" / "tests" / "models", ROOT / ".cache" / "demo", lambda text: None)
    # Not /tmp, which may lie in memory.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        cache = QuantizedCache(Path(directory), UNLIMITED)
        first_s, first = _timed(cache, base)
        cold, cached = _measure(cache, base)
        size = cache.entries()[0].size_bytes
        same = base_fingerprint(_load(cache, base).model) == base_fingerprint(first.model)
    ratio = round(statistics.median(cold) / statistics.median(cached), 1)
    yield {"figure": "quantizing over cached load", "value": ratio, "unit": "x", "must": 4, "better": "higher"}
    yield {"figure": "cached base has the same logits", "value": int(same), "unit": "", "must": 1, "better": "higher"}
    yield _told("load, quantizing", statistics.median(cold), "s")
    yield _told("load, quantizing and kept for the next", first_s, "s")
    yield _told("load, cached and verified", statistics.median(cached), "s")
    yield _told("quantized base on disk", size / 1e6, "MB")


def _measure(cache: QuantizedCache, base: BaseModel) -> tuple[list[float], list[float]]:
    """Seconds of each round: without the cache, and with it."""
    cold: list[float] = []
    cached: list[float] = []
    for index in range(ROUNDS):
        for ours in (None, cache) if index % 2 == 0 else (cache, None):
            seconds, loaded = _timed(ours, base)
            assert loaded.source == ("quantized" if ours is None else "cached")
            (cold if ours is None else cached).append(seconds)
    return cold, cached


def _timed(cache: QuantizedCache | None, base: BaseModel) -> tuple[float, LoadedBase]:
    started = time.perf_counter()
    loaded = _load(cache, base)
    return time.perf_counter() - started, loaded


def _load(cache: QuantizedCache | None, base: BaseModel) -> LoadedBase:
    return load_cached_base(cache, base, Quantization(), torch.bfloat16, torch.device("cpu"))


def _told(name: str, value: float, unit: str) -> dict[str, Any]:
    return {"figure": name, "value": round(value, 3), "unit": unit, "must": None, "better": "lower"}
