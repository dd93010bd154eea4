"""The optimizer, its state as plain tensors, and the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import GlobalPageManager
from bitsandbytes.optim.optimizer import Optimizer8bit

from qlora_service.domain.jobs import FailureReason
from qlora_service.errors import JobFailed
from qlora_service.specs import Training
from qlora_service.training.device import can_page, synchronize
from qlora_service.training.sizes import EIGHT_BIT_BLOCK, MIN_8BIT_ELEMENTS, MIN_PAGED_ELEMENTS

OptimizerState = dict[str, dict[str, torch.Tensor]]
"""By the parameter's name in the model: its moments, their quantization constants, and its number of steps"""

_B_MATRICES = {"lora_B", "lora_embedding_B"}
_CODE_TABLES = ("qmap1", "qmap2")
"""bitsandbytes' tables of the values that 8-bit codes stand for: the same for every parameter, so never saved"""


def make_optimizer(model: torch.nn.Module, training: Training, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that `training.optim` names, over the model's trainable parameters.

    LoRA+: the B matrices are a group of their own with `lr_scale` = loraplus_lr_ratio; all other groups have 1. (PEFT's
    `create_loraplus_optimizer` also raises the rate of one-dimensional tensors and fixes that of embeddings at 1e-6.)

    Weight decay applies to matrices, not to one-dimensional tensors. transformers' `get_decay_parameter_names` decides
    by name: it excludes biases and norms, as here, but includes DoRA's magnitudes and VeRA's vectors. They are excluded
    here, because decay would pull a magnitude away from the base's, whereas it pulls B towards the base.

    bitsandbytes pages a state tensor only on CUDA and only if its parameter has at least 100,000 elements
    (optim/optimizer.py, `get_state_buffer`); parameters below 4,096 elements keep 32-bit state.
    """
    # Overrides are stored per id(parameter) in a process-wide object, and a new parameter may have a former one's id.
    bnb.optim.GlobalOptimManager.get_instance().initialize()
    groups = _parameter_groups(model, training)
    betas = (training.adam_beta1, training.adam_beta2)
    if training.optim == "adamw_torch":
        return torch.optim.AdamW(groups, lr=training.learning_rate, betas=betas)
    kind = bnb.optim.Lion if "lion" in training.optim else bnb.optim.AdamW
    optimizer: torch.optim.Optimizer = kind(
        groups,
        lr=training.learning_rate,
        betas=betas,
        optim_bits=8 if training.optim.endswith("8bit") else 32,
        is_paged=_is_paged(training, device),
    )
    return optimizer


@contextmanager
def managed_optimizer(
    model: torch.nn.Module, training: Training, device: torch.device
) -> Iterator[torch.optim.Optimizer]:
    """The optimizer; released on exit."""
    optimizer = make_optimizer(model, training, device)
    try:
        yield optimizer
    finally:
        release_optimizer(optimizer)


def release_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Drops the optimizer's state, bitsandbytes' process-wide references included; it cannot be used afterwards.

    Memory of paged buffers is freed only when the process exits: bitsandbytes has no call that frees them
    (functional.py, `get_paged`).
    """
    optimizer.state.clear()
    bnb.optim.GlobalOptimManager.get_instance().initialize()
    GlobalPageManager.get_instance().initialize()


def may_leave_paged_memory(model: torch.nn.Module, training: Training, device: torch.device) -> bool:
    """Whether optimizer state lies in managed memory, which is freed only when the process exits.

    A process runs no further job after one with paged state, because that job would have less memory
    (see `release_optimizer`).
    """
    trainable = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return _is_paged(training, device) and any(each.numel() >= MIN_PAGED_ELEMENTS for each in trainable)


def learning_rate(step: int, total_steps: int, training: Training) -> float:
    """The rate of optimizer step `step` (from 0): a linear warmup from above zero, then the schedule.

    After the warmup the schedules equal transformers' `constant_with_warmup`, `linear` and `cosine`; linear and cosine
    reach zero after the last step. The warmup differs: transformers' starts at zero, which wastes the first step, and
    its `constant` has none.
    """
    warmup = training.warmup_steps
    if warmup is None:
        warmup = math.ceil(total_steps * training.warmup_ratio)
    if step < warmup:
        return training.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[training.lr_scheduler_type]
    return training.learning_rate * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets every group's rate to `rate` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def optimizer_state(optimizer: torch.optim.Optimizer) -> OptimizerState:
    """A copy of the state on the CPU, without parameters that have had no step.

    The next step depends on it and on the parameters alone: rates follow from the schedule.
    """
    saved: OptimizerState = {}
    # A paged buffer is a CPU tensor that the device may still be writing to.
    synchronize(optimizer.param_groups[0]["params"][0].device)
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if state := optimizer.state.get(parameter):
                saved[name] = {
                    key: torch.as_tensor(value).detach().to("cpu", copy=True)
                    for key, value in state.items()
                    if key not in _CODE_TABLES
                }
    return saved


def optimizer_state_bytes(model: torch.nn.Module, training: Training) -> int:
    """Bytes of `optimizer_state` after the first step."""
    moments = 1 if "lion" in training.optim else 2
    total = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        elements = parameter.numel()
        if training.optim.endswith("8bit") and elements >= MIN_8BIT_ELEMENTS:
            # One byte per value, and a float32 constant per block of 256.
            total += moments * (elements + 4 * math.ceil(elements / EIGHT_BIT_BLOCK))
        else:
            total += moments * elements * (parameter.element_size() if training.optim == "adamw_torch" else 4)
        total += 8  # the step counter
    return total


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: OptimizerState) -> None:
    """Loads a result of `optimizer_state` into a new optimizer; paged buffers are paged again.

    bitsandbytes' own `load_state_dict` leaves copies on the device, so its buffers are allocated and filled here.

    Raises:
        JobFailed: the state belongs to other parameters or to another optimizer.
    """
    names = {name for group in optimizer.param_groups for name in group["param_names"]}
    if unknown := saved.keys() - names:
        raise _state_mismatch(min(unknown), "the model does not train it")
    for group_index, group in enumerate(optimizer.param_groups):
        for index, (name, parameter) in enumerate(zip(group["param_names"], group["params"], strict=True)):
            if name not in saved:
                continue
            if isinstance(optimizer, Optimizer8bit):
                optimizer.init_state(group, parameter, group_index, index)
                synchronize(parameter.device)  # the device writes the zeros of a paged buffer
                _fill_buffers(name, optimizer.state[parameter], saved[name])
            else:
                optimizer.state[parameter] = _torch_state(name, parameter, saved[name])


def _is_paged(training: Training, device: torch.device) -> bool:
    return training.optim.startswith("paged") and can_page(device)


def _parameter_groups(model: torch.nn.Module, training: Training) -> list[dict[str, Any]]:
    """Trainable parameters with their names, grouped by learning rate and weight decay."""
    groups: dict[tuple[float, float], list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_b = not _B_MATRICES.isdisjoint(name.split("."))
            scale = (training.loraplus_lr_ratio or 1.0) if is_b else 1.0
            decay = training.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((scale, decay), []).append((name, parameter))
    return [
        {"params": named, "lr": training.learning_rate * scale, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), named in groups.items()
    ]


def _fill_buffers(name: str, state: dict[str, Any], saved: dict[str, torch.Tensor]) -> None:
    """Copies saved values into the new buffers of a parameter. Raises: JobFailed."""
    if saved.keys() != state.keys() - set(_CODE_TABLES):
        raise _state_mismatch(name, f"it holds {sorted(saved)}")
    for key, value in saved.items():
        if key == "step":
            state[key] = int(value)
        elif state[key].shape != value.shape or state[key].dtype != value.dtype:
            raise _state_mismatch(name, f"{key} has shape {tuple(value.shape)} and type {value.dtype}")
        else:
            state[key].copy_(value)


def _torch_state(name: str, parameter: torch.nn.Parameter, saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of torch's AdamW, whose step counter stays on the CPU. Raises: JobFailed."""
    if saved.keys() != {"step", "exp_avg", "exp_avg_sq"} or saved["exp_avg"].shape != parameter.shape:
        raise _state_mismatch(name, f"it holds {sorted(saved)}")
    return {
        key: value.clone() if key == "step" else value.to(parameter.device, copy=True) for key, value in saved.items()
    }


def _state_mismatch(name: str, why: str) -> JobFailed:
    return JobFailed(
        f"the checkpoint's optimizer state for {name} does not fit this job's optimizer: {why}. Submit the job again",
        reason=FailureReason.INTERNAL,
    )
