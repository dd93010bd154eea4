"""The modules of a base that an adapter is put on, decided on the modules themselves, and the weights left without one.

PEFT and transformers decide by class and name: a router is a linear layer that returns a tuple, the experts of a layer
are one parameter, and some names are reserved (PEFT 0.21, transformers 5.23).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers.pytorch_utils import Conv1D

from qlora_service import specs
from qlora_service.errors import Finding, InvalidSpec
from qlora_service.models.reach import useless_layers

HYBRID_MODELS = {"falcon_h1", "nemotron_h"}
MAMBA_MODULES = {"conv1d", "out_proj"}
"""Modules of Mamba layers whose weight the fused kernels read past an adapter: PEFT refuses them in these models.

Source: PEFT, tuners/tuners_utils.py, `_check_lora_target_modules_mamba`.
"""
POINTER = "/adapter/target_modules"
FUSED_EXPERTS = {"gate_up_proj": {"gate_proj", "up_proj", "w1", "w3"}, "down_proj": {"down_proj", "w2"}}
"""The names that the published weights of single experts have, by the parameter that transformers keeps them in."""
LINEAR_LAYERS = (torch.nn.Linear, Conv1D, bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
NOT_MATRICES = (
    torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.LayerNorm, torch.nn.GroupNorm,
)  # fmt: skip


def last_name_part(name: str) -> str:
    """q_proj of model.layers.0.self_attn.q_proj."""
    return name.rpartition(".")[2]


def all_linear(base: torch.nn.Module) -> list[str] | None:
    """Full names of the linear layers that "all-linear" selects; None if PEFT's own selection is the same."""
    names = list(_linear_layers(base))
    useless = useless_layers(base)
    adaptable = [name for name in names if name not in useless and _is_adaptable(base, name)]
    return None if len(adaptable) == len(names) else adaptable


def check_targets(adapter: specs.TargetedAdapter, base: torch.nn.Module, config: PeftConfig) -> None:
    """Raises: InvalidSpec, when the adapter cannot be put on a module that it names, or on the experts of the base."""
    findings: list[Finding] = []
    converted = _converted(config, base, findings)
    named = [] if isinstance(adapter.target_modules, str) else adapter.target_modules
    by_name: dict[str, list[str]] = {name: [] for name in named if name in converted.target_modules}
    for name, module in base.named_modules():
        if last_name_part(name) in by_name and next(module.children(), None) is None:
            by_name[last_name_part(name)].append(name)
    refused = [name for name, modules in by_name.items() if not modules or not _any_adaptable(base, modules)]
    if refused:
        findings.append(Finding(f"PEFT cannot adapt {', '.join(refused)} of this base{_hint(base)}", POINTER))
    if getattr(converted, "target_parameters", None):
        findings += _expert_findings(adapter)
    if findings:
        first = findings[0]
        raise InvalidSpec(f"the adapter cannot be attached: {first.reason}", location=first.pointer, findings=findings)


def matrices(base: torch.nn.Module, adapter: specs.TargetedAdapter) -> dict[str, torch.nn.Parameter]:
    """The weight matrices that the adapter's target modules select, by name: of linear layers, routers and experts."""
    named = None if isinstance(adapter.target_modules, str) else set(adapter.target_modules)
    head = _output_head(base)
    selected = {}
    for module_name, module in base.named_modules():
        if isinstance(module, NOT_MATRICES) or module is head:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            is_linear = isinstance(module, LINEAR_LAYERS)
            target = last_name_part(module_name) if name == "weight" else name
            names = {target} | (set() if is_linear else FUSED_EXPERTS.get(target, set()))
            is_matrix = name == "weight" if is_linear else parameter.dim() > 1 and "bias" not in name
            if is_matrix and (named is None or not named.isdisjoint(names)):
                selected[f"{module_name}.{name}"] = parameter
    return selected


def adapted_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters of the base that an attached adapter changes the product of."""
    return [
        module.get_param() if isinstance(module, ParamWrapper) else module.get_base_layer().weight
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
    ]


def elements(parameter: Any) -> int:
    """The weights of a parameter, packed or not."""
    state = getattr(parameter, "quant_state", None)
    count: int = parameter.numel() if state is None else torch.Size(state.shape).numel()
    return count


def _linear_layers(base: torch.nn.Module) -> Iterator[str]:
    head = _output_head(base)
    for name, module in base.named_modules():
        if isinstance(module, LINEAR_LAYERS) and module is not head:
            yield name


def _output_head(base: Any) -> torch.nn.Module | None:
    head: torch.nn.Module | None = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    return head


def _any_adaptable(base: torch.nn.Module, names: list[str]) -> bool:
    return any(_is_adaptable(base, name) for name in names)


def _is_adaptable(base: torch.nn.Module, name: str) -> bool:
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    if model_type in HYBRID_MODELS and last_name_part(name) in MAMBA_MODULES:
        return False
    return _maps_features(base.get_submodule(name))


@torch.no_grad()
def _maps_features(module: Any) -> bool:
    """Whether the module is an embedding or a convolution, or maps (…, in) to (…, out) as a linear layer does."""
    if type(module) in LINEAR_LAYERS or isinstance(module, NOT_MATRICES):
        return True
    if not isinstance(module, LINEAR_LAYERS):
        return False
    weight = module.weight
    try:
        output: Any = module(torch.zeros(1, module.in_features, dtype=weight.dtype, device=weight.device))
    except Exception:  # noqa: BLE001 - a forward of any class, with an input that may not suit it
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, module.out_features)


def _converted(config: PeftConfig, base: Any, findings: list[Finding]) -> PeftConfig:
    """The configuration as PEFT changes it for this base: targets that are experts become parameters."""
    converted = copy.deepcopy(config)
    if isinstance(config, LoraConfig) and hasattr(base, "config"):
        try:
            convert_peft_config_for_transformers(converted, base, None)
        except ValueError as error:
            findings.append(Finding(f"{str(error).rstrip('.')}: name them together, or none of them", POINTER))
    return converted


def _expert_findings(adapter: specs.TargetedAdapter) -> Iterator[Finding]:
    """What LoRA on the parameters of experts cannot do, other than on linear layers."""
    if not isinstance(adapter, specs.Lora):
        return
    way_out = "or name target_modules without experts, such as those of the attention"
    if adapter.lora_dropout:
        yield Finding(f"LoRA on experts has no dropout: set lora_dropout to 0, {way_out}", "/adapter/lora_dropout")
    if adapter.use_dora:
        yield Finding(f"DoRA cannot adapt experts: set use_dora to false, {way_out}", "/adapter/use_dora")
    if adapter.init_lora_weights == "olora":
        yield Finding(
            f"OLoRA cannot adapt experts: set init_lora_weights to default, {way_out}", "/adapter/init_lora_weights"
        )


def _hint(base: torch.nn.Module) -> str:
    counted = Counter(last_name_part(name) for name in _linear_layers(base) if _is_adaptable(base, name))
    return f"; it can adapt {', '.join(sorted(counted))}" if counted else ""
