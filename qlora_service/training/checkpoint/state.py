"""The state of a training after a completed step, as plain values and as the files of a checkpoint."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import safetensors.torch
import torch

from qlora_service.training.evaluation.held_out import HeldOutState
from qlora_service.training.evaluation.row_losses import RowLossesState
from qlora_service.training.objectives import Evaluation
from qlora_service.training.optimizer import OptimizerState

RECENT_LOSSES = 20
"""Most losses in `StepHistory.recent_losses`"""
PARAMETERS, OPTIMIZER, ALLOCATION, ROW_LOSSES, BEST, VALUES = (
    "parameters.safetensors",
    "optimizer.safetensors",
    "allocation.safetensors",
    "row_losses.safetensors",
    "best.safetensors",
    "state.json",
)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepHistory:
    """Summary of the completed steps."""

    step: int = 0
    """Completed steps, the skipped ones included"""
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    recent_losses: tuple[float, ...] = ()
    """Of the last steps that were not skipped"""
    loss: float = 0.0
    """Of the last step, skipped or not, as is `grad_norm`"""
    grad_norm: float = 0.0

    def after(self, loss: float, grad_norm: float, skipped: bool) -> StepHistory:
        """The history with one more step."""
        if skipped:
            return StepHistory(
                self.step + 1, self.skipped_steps + 1, self.skipped_in_a_row + 1, self.recent_losses, loss, grad_norm
            )
        recent = (*self.recent_losses, loss)[-RECENT_LOSSES:]
        return StepHistory(self.step + 1, self.skipped_steps, 0, recent, loss, grad_norm)


@dataclass(frozen=True)
class TrainingState:
    """Everything that the steps after a completed one depend on, copied to the CPU.

    The data order and the learning rate are not part of it, because they follow from the step's number.
    """

    history: StepHistory
    parameters: Tensors
    """The trainable parameters by name"""
    optimizer: OptimizerState
    allocation: Tensors
    """AdaLoRA's rank allocation (`adapters.allocation_state`)"""
    held_out: HeldOutState
    row_losses: RowLossesState
    random_state: dict[str, Any]
    """See `random_state`"""
    micro_batch_tokens: int
    gradient_checkpointing: bool

    @property
    def step(self) -> int:
        """Completed steps."""
        return self.history.step


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every library's random generator, as JSON values."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state(device).numpy().tobytes().hex() if device.type == "cuda" else None
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": cuda,
    }


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Sets every generator to a result of `random_state`; a GPU's generator only on a GPU."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_bytes_tensor(state["torch"]))
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(_bytes_tensor(state["cuda"]), device)


def to_files(state: TrainingState) -> dict[str, bytes]:
    """File contents by name; `from_files` restores the state bit for bit."""
    held_out = replace(state.held_out, best_weights={})
    values = {
        "history": asdict(state.history),
        "held_out": asdict(held_out),
        "random_state": state.random_state,
        "micro_batch_tokens": state.micro_batch_tokens,
        "gradient_checkpointing": state.gradient_checkpointing,
    }
    optimizer = {f"{key}/{name}": value for name, moments in state.optimizer.items() for key, value in moments.items()}
    row_losses = {name: torch.from_numpy(column) for name, column in state.row_losses.items()}
    return {
        PARAMETERS: _tensors_to_bytes(state.parameters),
        OPTIMIZER: _tensors_to_bytes(optimizer),
        ALLOCATION: _tensors_to_bytes(state.allocation),
        ROW_LOSSES: _tensors_to_bytes(row_losses),
        BEST: _tensors_to_bytes(state.held_out.best_weights),
        VALUES: json.dumps(values).encode(),  # Python writes the shortest text that parses to the same float
    }


def from_files(files: Mapping[str, bytes]) -> TrainingState:
    """The state whose `to_files` gave these files."""
    values = json.loads(files[VALUES])
    optimizer: OptimizerState = {}
    for path, value in safetensors.torch.load(files[OPTIMIZER]).items():
        key, _, name = path.partition("/")
        optimizer.setdefault(name, {})[key] = value
    history, held_out = values["history"], values["held_out"]
    evaluations = {when: held_out[when] and Evaluation(**held_out[when]) for when in ("before", "best", "chosen")}
    return TrainingState(
        history=StepHistory(**history | {"recent_losses": tuple(history["recent_losses"])}),
        parameters=safetensors.torch.load(files[PARAMETERS]),
        optimizer=optimizer,
        allocation=safetensors.torch.load(files[ALLOCATION]),
        held_out=HeldOutState(
            **held_out | evaluations | {"best_weights": safetensors.torch.load(files[BEST])},
        ),
        row_losses={name: column.numpy() for name, column in safetensors.torch.load(files[ROW_LOSSES]).items()},
        random_state=values["random_state"],
        micro_batch_tokens=values["micro_batch_tokens"],
        gradient_checkpointing=values["gradient_checkpointing"],
    )


def _bytes_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _tensors_to_bytes(tensors: Tensors) -> bytes:
    data: bytes = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    return data
