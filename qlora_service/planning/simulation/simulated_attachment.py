"""A job's adapter attached to its base on meta tensors: what PEFT adapts, and what stays without an adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from peft import get_peft_model_state_dict

from qlora_service.errors import InvalidSpec
from qlora_service.models.adapters import attach_adapter, trainable_parameters
from qlora_service.models.targets import LINEAR_LAYERS, adapted_parameters, elements, matrices
from qlora_service.planning.attachment import Attachment
from qlora_service.planning.simulation.simulated_base import META, simulated_base
from qlora_service.specs import JobSpec, TargetedAdapter


def simulated_attachment(config: Mapping[str, Any], spec: JobSpec) -> Attachment:
    """The result of attaching the spec's adapter, which has target modules. Errors of transformers pass unchanged."""
    assert isinstance(spec.adapter, TargetedAdapter)
    base = simulated_base(config, spec.quantization, torch.bfloat16)
    selected = matrices(base, spec.adapter)
    linear = {id(module.weight) for module in base.modules() if isinstance(module, LINEAR_LAYERS)}
    total = sum(elements(parameter) for parameter in base.parameters())
    try:
        with META:
            model = attach_adapter(base, spec.adapter, spec.training.seed)
    except InvalidSpec as error:
        return Attachment(refusal=error.message, location=error.location, findings=error.findings)
    adapted = {id(parameter) for parameter in adapted_parameters(model)}
    # Without `state_dict()`, which would read the values of quantization constants.
    state = {**dict(model.named_parameters()), **dict(model.named_buffers(remove_duplicate=False))}
    stored = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    left_out: dict[str, int] = {}
    for name, parameter in selected.items():
        if id(parameter) not in adapted:
            kind = re.sub(r"\b\d+\b", "*", name)
            left_out[kind] = left_out.get(kind, 0) + elements(parameter)
    return Attachment(
        base_parameters=total,
        trained_parameters=sum(parameter.numel() for parameter in trainable_parameters(model)),
        stored_parameters=sum(tensor.numel() for tensor in stored.values()),
        left_out=left_out,
        linear_left_out=any(id(selected[name]) in linear - adapted for name in selected),
    )
