"""Memory of a job's largest step: predicted, and measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qlora_service.data.batching import pack
from qlora_service.errors import InvalidModel
from qlora_service.planning.memory_formula import estimated_memory
from qlora_service.planning.shapes import ModelShape
from qlora_service.planning.simulation.run import CannotSimulate, Simulator
from qlora_service.planning.simulation.tracked_step import tracking
from qlora_service.specs import JobSpec
from qlora_service.training.device import peak_memory_bytes, peak_reserved_bytes
from qlora_service.training.network.network import Network

MAX_STEPS_SEARCHED = 2000
"""Steps among which the largest micro-batch is searched; in longer jobs it is nearly always as large as any"""


def predicted_memory(
    model_dir: Path, spec: JobSpec, plan: Mapping[str, Any], *, longest_tokens: int, cuda: bool, cache_dir: Path | None
) -> dict[str, Any] | None:
    """The predicted memory of the job under its plan's settings, and the prediction's source.

    The simulator's result if an earlier plan left one for these settings in `cache_dir`, else the formula's. None if
    the model's config lacks a size.
    """
    config = json.loads((model_dir / "config.json").read_bytes())
    settings = {
        "micro_batch_tokens": plan["micro_batch_tokens"],
        "checkpointing": plan["gradient_checkpointing"],
        "compute_dtype": plan["compute_dtype"],
        "longest_tokens": longest_tokens,
    }
    try:
        simulator = Simulator(timeout_s=0, cache_dir=cache_dir)
        prediction = simulator.simulate(config, spec, cuda=cuda, **settings)
        source = "simulation"
    except CannotSimulate:
        try:
            prediction = estimated_memory(ModelShape.from_config(config), spec, cuda=cuda, **settings)
            source = "formula"
        except InvalidModel:
            return None
    except InvalidModel:
        return None
    reserved = {"reserved": prediction.reserved} if cuda else {}
    return {"allocated": prediction.allocated, **reserved, "source": source, **settings}


def find_largest_step(
    lengths: Sequence[int], rows_of_step: Callable[[int], Sequence[int]], budget_tokens: int, steps: range
) -> int:
    """The first of `steps` (from 0) that has the largest micro-batch; `rows_of_step(i)` are positions in `lengths`.

    Step 0 is chosen only if there is no other: optimizers allocate their state at its end.
    """
    candidates = steps[1:] if steps.start == 0 and len(steps) > 1 else steps

    def largest_micro_batch(step: int) -> int:
        tokens = [lengths[row] for row in rows_of_step(step)]
        return max(sum(tokens[index] for index in members) for members in pack(tokens, budget_tokens))

    return max(candidates[:MAX_STEPS_SEARCHED], key=largest_micro_batch)


class TrackedStep:
    """A context around every step; in one of them it tracks the bytes of tensors, and passes the peak on."""

    def __init__(self, network: Network, step: int, on_peak: Callable[[dict[str, Any]], None]) -> None:
        self._network, self._step, self._on_peak = network, step, on_peak

    @contextmanager
    def __call__(self, step: int, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        if step != self._step:
            yield
            return
        with tracking(self._network.model, optimizer) as tracker:
            yield
        self._on_peak({"allocated": tracker.peak, "source": f"tensors of step {step + 1}"})


def peak_memory(device: torch.device) -> dict[str, Any] | None:
    """The peak of torch's allocator since the attempt began, in bytes; None on a CPU, where a step is tracked."""
    reserved = peak_reserved_bytes(device)
    if reserved is None:
        return None
    return {"allocated": peak_memory_bytes(device), "reserved": reserved, "source": "torch's allocator"}
