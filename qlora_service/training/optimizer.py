"""The optimizer, its state as plain tensors, and the learning rate's schedule."""

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
from qlora_service.training.sizes import EIGHT_BIT_BLOCK, FEWEST_8BIT_ELEMENTS, FEWEST_PAGED_ELEMENTS

OptimizerState = dict[str, dict[str, torch.Tensor]]
"""By the parameter's name in the model: its moments, their constants, and the number of steps it took."""

_B_MATRICES = {"lora_B", "lora_embedding_B"}
_CODE_TABLES = ("qmap1", "qmap2")
"""The values that 8-bit codes stand for: bitsandbytes' own, the same for every parameter, so never stored."""


def make_optimizer(model: torch.nn.Module, training: Training, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer asked for, over the model's trainable parameters.

    LoRA+ gives the B matrices their own group, with `lr_scale` = loraplus_lr_ratio; everywhere else it is 1. (PEFT's
    `create_loraplus_optimizer` also raises the rate of one-dimensional tensors and fixes that of embeddings at 1e-6.)

    Weight decay applies to matrices, not to one-dimensional tensors. transformers' `get_decay_parameter_names` goes by
    name: it leaves out biases and norms, as this does, but takes in DoRA's magnitudes and VeRA's vectors. Those stay
    out here: decay would pull a magnitude away from the base's, where it pulls B towards the base.

    bitsandbytes pages a state tensor only if its parameter has at least 100,000 elements, and only on CUDA
    (optim/optimizer.py, `get_state_buffer`); parameters below 4,096 elements keep 32-bit state.
    """
    # Overrides are kept per id(parameter), in one object for the process: a new parameter may have an old one's id.
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


def leaves_paged_memory(model: torch.nn.Module, training: Training, device: torch.device) -> bool:
    """Whether the optimizer's state lies in managed memory, which returns with the process only (`release_optimizer`).

    The first job of a process that has some is its last: the next one would find that much less.
    """
    learned = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return _is_paged(training, device) and any(one.numel() >= FEWEST_PAGED_ELEMENTS for one in learned)


def _is_paged(training: Training, device: torch.device) -> bool:
    return training.optim.startswith("paged") and can_page(device)


def _parameter_groups(model: torch.nn.Module, training: Training) -> list[dict[str, Any]]:
    """Trainable parameters with their names, by rate and decay."""
    members: dict[tuple[float, float], list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_b = not _B_MATRICES.isdisjoint(name.split("."))
            scale = (training.loraplus_lr_ratio or 1.0) if is_b else 1.0
            decay = training.weight_decay if parameter.ndim > 1 else 0.0
            members.setdefault((scale, decay), []).append((name, parameter))
    return [
        {"params": named, "lr": training.learning_rate * scale, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), named in members.items()
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the rate times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def optimizer_state(optimizer: torch.optim.Optimizer) -> OptimizerState:
    """A copy of the state, on the CPU; parameters that were never stepped are left out.

    Together with the parameters it is all that the next step depends on: rates come from the schedule.
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
    """What `optimizer_state` will come to after the first step."""
    moments = 1 if "lion" in training.optim else 2
    total = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        elements = parameter.numel()
        if training.optim.endswith("8bit") and elements >= FEWEST_8BIT_ELEMENTS:
            # A byte a value, and a float32 constant for each block of 256.
            total += moments * (elements + 4 * math.ceil(elements / EIGHT_BIT_BLOCK))
        else:
            total += moments * elements * (parameter.element_size() if training.optim == "adamw_torch" else 4)
        total += 8  # the step
    return total


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: OptimizerState) -> None:
    """Put a new optimizer where `optimizer_state` was taken; what pages is paged again.

    bitsandbytes' own `load_state_dict` leaves copies on the device: its buffers have to be made anew and filled.

    Raises:
        JobFailed: the state is of other parameters or of another optimizer.
    """
    names = {name for group in optimizer.param_groups for name in group["param_names"]}
    if unknown := saved.keys() - names:
        raise _not_ours(min(unknown), "the model does not train it")
    for group_index, group in enumerate(optimizer.param_groups):
        for index, (name, parameter) in enumerate(zip(group["param_names"], group["params"], strict=True)):
            if name not in saved:
                continue
            if isinstance(optimizer, Optimizer8bit):
                optimizer.init_state(group, parameter, group_index, index)
                synchronize(parameter.device)  # the zeros of a paged buffer are written by the device
                _fill(name, optimizer.state[parameter], saved[name])
            else:
                optimizer.state[parameter] = _torch_state(name, parameter, saved[name])


def _fill(name: str, state: dict[str, Any], saved: dict[str, torch.Tensor]) -> None:
    """Copy saved values into a parameter's new buffers. Raises: JobFailed."""
    if saved.keys() != state.keys() - set(_CODE_TABLES):
        raise _not_ours(name, f"it holds {sorted(saved)}")
    for key, value in saved.items():
        if key == "step":
            state[key] = int(value)
        elif state[key].shape != value.shape or state[key].dtype != value.dtype:
            raise _not_ours(name, f"{key} has shape {tuple(value.shape)} and type {value.dtype}")
        else:
            state[key].copy_(value)


def _torch_state(name: str, parameter: torch.nn.Parameter, saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of torch's AdamW, whose step counter stays on the CPU. Raises: JobFailed."""
    if saved.keys() != {"step", "exp_avg", "exp_avg_sq"} or saved["exp_avg"].shape != parameter.shape:
        raise _not_ours(name, f"it holds {sorted(saved)}")
    return {
        key: value.clone() if key == "step" else value.to(parameter.device, copy=True) for key, value in saved.items()
    }


def _not_ours(name: str, why: str) -> JobFailed:
    return JobFailed(
        f"the checkpoint's optimizer state for {name} does not fit this job's optimizer: {why}. Start the job anew",
        reason=FailureReason.INTERNAL,
    )


@contextmanager
def optimizing(model: torch.nn.Module, training: Training, device: torch.device) -> Iterator[torch.optim.Optimizer]:
    """The optimizer, released at the end."""
    optimizer = make_optimizer(model, training, device)
    try:
        yield optimizer
    finally:
        release_optimizer(optimizer)


def release_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Let go of the state, also where bitsandbytes holds it for the whole process; the optimizer is of no use after.

    Memory of paged buffers returns with the process only: bitsandbytes has no call that frees them (functional.py,
    `get_paged`).
    """
    optimizer.state.clear()
    bnb.optim.GlobalOptimManager.get_instance().initialize()
    GlobalPageManager.get_instance().initialize()


def learning_rate(step: int, total_steps: int, training: Training) -> float:
    """The rate of optimizer step `step` (from 0): a linear rise from above zero, then the schedule.

    After the rise these are transformers' `constant_with_warmup`, `linear` and `cosine`; linear and cosine reach zero
    after the last step. The rise differs: transformers begins at zero, which wastes the first step, and its `constant`
    has none.
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
