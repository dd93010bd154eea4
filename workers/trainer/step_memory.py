"""What a job's largest step takes of memory: as it is predicted, and as it turns out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qlora_service.data.batching import pack
from qlora_service.errors import InvalidModel
from qlora_service.planning.formula import memory
from qlora_service.planning.shapes import ModelShape
from qlora_service.planning.simulation.run import CannotSimulate, Simulator
from qlora_service.planning.simulation.tracked_step import tracking
from qlora_service.specs import JobSpec
from qlora_service.training.device import peak_memory_bytes, peak_reserved_bytes
from qlora_service.training.network.network import Network

LOOKED_THROUGH = 2000
"""Steps among which the largest micro-batch is looked for: of a longer job's, nearly always as large as any"""


def predicted_memory(
    model_dir: Path, spec: JobSpec, plan: Mapping[str, Any], *, longest_tokens: int, cuda: bool, cache_dir: Path | None
) -> dict[str, Any] | None:
    """What the job was to take with the settings of its plan, and by whose word; None where its config lacks a size.

    The simulator's answer if somebody asked for these very settings before, else the closed form's.
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
        found, source = simulator.simulate(config, spec, cuda=cuda, **settings), "simulation"
    except CannotSimulate:
        try:
            found, source = memory(ModelShape.from_config(config), spec, cuda=cuda, **settings), "formula"
        except InvalidModel:
            return None
    except InvalidModel:
        return None
    reserved = {"reserved": found.reserved} if cuda else {}
    return {"allocated": found.allocated, **reserved, "source": source, **settings}


def find_largest_step(
    lengths: Sequence[int], members_of: Callable[[int], Sequence[int]], budget_tokens: int, steps: range
) -> int:
    """The first of the steps (from 0) that has the largest micro-batch; `members_of(i)` are step i's rows.

    The very first step is taken only if there is no other: optimizers make their state at its end.
    """
    looked_through = steps[1:] if steps.start == 0 and len(steps) > 1 else steps

    def largest_pack(step: int) -> int:
        tokens = [lengths[row] for row in members_of(step)]
        return max(sum(tokens[index] for index in members) for members in pack(tokens, budget_tokens))

    return max(looked_through[:LOOKED_THROUGH], key=largest_pack)


class TrackedStep:
    """Entered around every step; tracks one of them, and tells how many bytes of tensors there were."""

    def __init__(self, network: Network, step: int, told: Callable[[dict[str, Any]], None]) -> None:
        self._network, self._step, self._told = network, step, told

    @contextmanager
    def __call__(self, step: int, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        if step != self._step:
            yield
            return
        with tracking(self._network.model, optimizer) as tracker:
            yield
        self._told({"allocated": tracker.peak, "source": f"tensors of step {step + 1}"})


def peak_memory(device: torch.device) -> dict[str, Any] | None:
    """What torch's allocator had at most since the attempt began; None on a CPU, where a step is tracked."""
    reserved = peak_reserved_bytes(device)
    if reserved is None:
        return None
    return {"allocated": peak_memory_bytes(device), "reserved": reserved, "source": "torch's allocator"}
