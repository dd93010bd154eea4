"""The memory of a job's largest step, and its adapter's modules, simulated in a child process from a config.json.

The child builds the model with shapes in place of values and runs the training's own step on it
(`planning.simulation.child`). This module limits the child's time and stores its results.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from qlora_service.planning.attachment import Attachment
from qlora_service.planning.cards import resolved_dtype
from qlora_service.planning.largest_step import STEP_FIELDS
from qlora_service.planning.memory import Memory
from qlora_service.planning.shapes import ModelShape
from qlora_service.specs import JobSpec

Answer = TypeVar("Answer")
CHILD_MODULE = "qlora_service.planning.simulation.child"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "qlora-service")
"""Stored results are valid for one set of versions of these"""


class CannotSimulate(Exception):
    """No simulation is possible, for this reason; the closed form (`planning.memory_formula`) remains."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Simulator:
    """Simulates steps in child processes."""

    timeout_s: float
    """Time limit of a simulation; with 0, only stored results are used"""
    cache_dir: Path | None = None
    """Stored results; None: none are stored"""

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
        """The memory of the job's largest step on a CUDA device (Ampere or newer) or on a CPU.

        `longest_tokens` is the longest row; None: the longest that the spec allows. `compute_dtype` is the dtype that
        "auto" selects; None: bfloat16 on CUDA, float32 on a CPU.

        Raises:
            CannotSimulate: transformers, peft or torch cannot build or run the step, or it exceeded `timeout_s`.
            InvalidModel: the config lacks a size.
        """
        request = {
            "config": dict(config),
            "spec": {
                "base_model": "simulated",
                "training": spec.training.model_dump(mode="json", include=STEP_FIELDS),
                **spec.model_dump(mode="json", include={"quantization", "adapter", "objective"}),
            },
            "micro_batch_tokens": micro_batch_tokens,
            "longest_tokens": longest_tokens or ModelShape.from_config(config).longest_tokens(spec),
            "checkpointing": checkpointing,
            "cuda": cuda,
            "compute_dtype": resolved_dtype(spec, cuda=cuda, auto=compute_dtype),
        }
        return self._answer(request, Memory.from_dict)

    def attach(self, config: Mapping[str, Any], spec: JobSpec) -> Attachment:
        """The result of attaching the job's adapter to the base.

        Raises:
            CannotSimulate: transformers cannot build the base, or it exceeded `timeout_s`.
        """
        document = {"base_model": "simulated", **spec.model_dump(mode="json", include={"quantization", "adapter"})}
        return self._answer({"config": dict(config), "spec": document}, Attachment.from_dict)

    def _answer(self, request: dict[str, Any], read: Callable[[Any], Answer]) -> Answer:
        """The child's answer, stored or new. Raises: CannotSimulate."""
        if self.cache_dir is None:
            return read(_run_child(request, self.timeout_s))
        versions = {name: version(name) for name in PACKAGES}
        key = hashlib.sha256(json.dumps([request, versions], sort_keys=True).encode()).hexdigest()
        stored = self.cache_dir / f"{key}.json"
        try:
            return read(json.loads(stored.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError):
            answer = _run_child(request, self.timeout_s)
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.cache_dir, delete=False) as new_file:
            new_file.write(json.dumps(answer).encode())
        Path(new_file.name).replace(stored)
        return read(answer)


def _run_child(request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """The child's answer. Raises: CannotSimulate."""
    if timeout_s <= 0:
        raise CannotSimulate("no stored simulation has these settings")
    try:
        child = subprocess.run(
            [sys.executable, "-m", CHILD_MODULE],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=timeout_s,
            check=False,
            # No secrets of the service (keys, tokens), no hub, no GPU.
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
        last_line = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise CannotSimulate(f"the simulation ended with status {child.returncode}: {last_line}") from None
    if "error" in answer:
        raise CannotSimulate(answer["error"])
    return answer
