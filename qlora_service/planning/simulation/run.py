"""The memory of a job's largest step, simulated in a child process: a config.json is all it needs.

The child builds the model with shapes in place of values and runs the training's own step on it
(`planning.simulation_child`); here it gets a time limit, and its answers are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora_service.planning.layer_cost import resolved_dtype
from qlora_service.planning.memory import Memory
from qlora_service.planning.shapes import ModelShape
from qlora_service.specs import JobSpec

CHILD = "qlora_service.planning.simulation.child"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "qlora-service")
"""A result holds for these versions"""
TRAINING_FIELDS = {"batch_size", "optim", "neftune_noise_alpha"}
"""Of `Training`, what memory depends on; lengths and budgets are given apart"""


class CannotSimulate(Exception):
    """Why there is no simulation; the closed form (`planning.formula`) is left."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Simulator:
    """Simulates steps in child processes."""

    timeout_s: float
    """Longest that a simulation may take; with 0 only the cache is looked up"""
    cache_dir: Path | None = None
    """Results of earlier simulations; None for no cache"""

    def simulate(
        self,
        config: Mapping[str, Any],
        spec: JobSpec,
        *,
        micro_batch_tokens: int,
        checkpointing: bool,
        longest_tokens: int | None = None,
        cuda: bool = True,
        compute_dtype: str | None = None,
    ) -> Memory:
        """Memory of the job's largest step, on a CUDA device from Ampere on or on a CPU.

        `longest_tokens` is the longest row, if it is known; else the longest that the spec admits. `compute_dtype` is
        the precision that "auto" stands for; None: bfloat16 on CUDA, float32 on a CPU.

        Raises:
            CannotSimulate: transformers, peft or torch cannot build or run it, or it took longer than `timeout_s`.
            InvalidModel: the config lacks a size.
        """
        request = {
            "config": dict(config),
            "spec": {
                "base_model": "simulated",
                "training": spec.training.model_dump(mode="json", include=TRAINING_FIELDS),
                **spec.model_dump(mode="json", include={"quantization", "adapter", "objective"}),
            },
            "micro_batch_tokens": micro_batch_tokens,
            "longest_tokens": longest_tokens or ModelShape.from_config(config).longest_tokens(spec),
            "checkpointing": checkpointing,
            "cuda": cuda,
            "compute_dtype": resolved_dtype(spec, cuda=cuda, auto=compute_dtype),
        }
        if self.cache_dir is None:
            return Memory.from_dict(_ask(request, self.timeout_s))
        versions = {name: version(name) for name in PACKAGES}
        key = hashlib.sha256(json.dumps([request, versions], sort_keys=True).encode()).hexdigest()
        kept = self.cache_dir / f"{key}.json"
        try:
            return Memory.from_dict(json.loads(kept.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError):
            answer = _ask(request, self.timeout_s)
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.cache_dir, delete=False) as fresh:
            fresh.write(json.dumps(answer).encode())
        Path(fresh.name).replace(kept)
        return Memory.from_dict(answer)


def _ask(request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """The child's answer. Raises: CannotSimulate."""
    if timeout_s <= 0:
        raise CannotSimulate("nobody simulated it before")
    try:
        child = subprocess.run(
            [sys.executable, "-m", CHILD],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=timeout_s,
            check=False,
            # Nothing of the service's (keys, tokens), no hub, no GPU.
            env={
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                "HF_HUB_OFFLINE": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
            },
        )
    except subprocess.TimeoutExpired:
        raise CannotSimulate(f"the simulation did not finish within {timeout_s:g} s") from None
    try:
        answer: dict[str, Any] = json.loads(child.stdout)
    except ValueError:
        last_words = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise CannotSimulate(f"the simulation ended with status {child.returncode}: {last_words}") from None
    if "error" in answer:
        raise CannotSimulate(answer["error"])
    return answer
