"""The general path's savings: a forward that keeps less for the backward pass, for modules of any architecture.

The replaced forward belongs to the module object and reads the module's children when it runs. A model whose adapter
has been unloaded therefore computes the same as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qlora_service.training.network.elementwise import FrozenNorm, Norm, SwiGlu
from qlora_service.training.network.lora_linear import fused_forward

GATED_MLP = {"gate_proj", "up_proj", "down_proj"}


def fuse(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules whose forward was replaced: LoRA layers, RMSNorms and gated SiLU layers."""
    fused = []
    for module in model.modules():
        forward = fused_forward(module) or _norm_forward(module) or _gated_forward(module)
        if forward is not None:
            module.forward = forward
            fused.append(module)
    return fused


def unfuse(modules: list[torch.nn.Module]) -> None:
    """Restores the forward of each module's class."""
    for module in modules:
        del module.forward


def frozen_norm(module: torch.nn.Module) -> Norm | None:
    """The weight and epsilon of a frozen RMSNorm; None for any other module."""
    eps, weight = getattr(module, "variance_epsilon", None), getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or eps is None or weight is None or weight.requires_grad:
        return None
    return Norm(weight.detach(), eps)


def is_silu(activation: Any) -> bool:
    """Whether the module is SiLU, the activation of a SwiGLU."""
    return type(activation).__name__ in {"SiLU", "SiLUActivation"}


def _norm_forward(module: torch.nn.Module) -> Callable[..., torch.Tensor] | None:
    norm = frozen_norm(module)
    return None if norm is None else lambda x: FrozenNorm.apply(x, norm)


def _gated_forward(module: Any) -> Callable[..., torch.Tensor] | None:
    children = {name for name, _ in module.named_children()}
    if children - {"act_fn"} != GATED_MLP or not is_silu(getattr(module, "act_fn", None)):
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = module.down_proj(SwiGlu.apply(module.gate_proj(x), module.up_proj(x)))
        return result

    return forward
