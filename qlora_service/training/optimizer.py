"""The optimizer and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import bitsandbytes as bnb
import torch

from qlora_service.specs import Training
from qlora_service.training.device import can_page


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter], training: Training, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW as asked for.

    bitsandbytes pages a state tensor only if its parameter has at least 100,000 elements, and only on CUDA
    (optim/optimizer.py, `get_state_buffer`).
    """
    rate, decay = training.learning_rate, training.weight_decay
    betas = (training.adam_beta1, training.adam_beta2)
    if training.optim == "adamw_torch":
        return torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=decay)
    bits = 8 if training.optim == "paged_adamw_8bit" else 32
    optimizer: torch.optim.Optimizer = bnb.optim.AdamW(
        parameters, lr=rate, betas=betas, weight_decay=decay, optim_bits=bits, is_paged=can_page(device)
    )
    return optimizer


def learning_rate(step: int, total_steps: int, training: Training) -> float:
    """The rate of optimizer step `step` (from 0): a linear rise from above zero, then the schedule.

    linear and cosine reach zero after the last step, as transformers' schedules do.
    """
    warmup = math.ceil(total_steps * training.warmup_ratio) if training.warmup_ratio else 0
    if step < warmup:
        return training.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[training.lr_scheduler_type]
    return training.learning_rate * factor
