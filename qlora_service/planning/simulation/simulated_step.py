"""The memory of one step, run on meta tensors in a process of its own (`planning.simulation.child`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel

from qlora_service.models.adapters import attach_adapter
from qlora_service.planning.largest_step import LargestStep
from qlora_service.planning.memory import Category, Memory
from qlora_service.planning.simulation.allocator import CUBLAS_WORKSPACE_BYTES, LARGE_STEP, ROUNDING, rounded
from qlora_service.planning.simulation.simulated_base import META, simulated_base, with_first_layers
from qlora_service.planning.simulation.simulated_device import simulated_device, workspaces
from qlora_service.planning.simulation.tracked_step import run_largest_step
from qlora_service.planning.simulation.tracker import Tracker
from qlora_service.specs import JobSpec
from qlora_service.training.network.isolation import Isolation, isolate_documents
from qlora_service.training.network.micro_batch import PER_DOCUMENT
from qlora_service.training.network.network import Network

PROBED_LAYERS = 8
"""Hybrid architectures repeat after eight layers at most (Jamba)"""


def simulated_memory(
    config: Mapping[str, Any],
    spec: JobSpec,
    step: LargestStep,
    *,
    compute_dtype: str,
    checkpointing: bool,
    cuda: bool,
) -> Memory:
    """The memory of the step. Errors of transformers, peft and torch pass unchanged."""
    dtype: torch.dtype = getattr(torch, compute_dtype)
    with simulated_device(cuda=cuda) as meta_values:
        # The kernel paths are probed on the first layers, which include every kind of layer.
        paths = Network(*_with_adapter(with_first_layers(config, PROBED_LAYERS), spec, dtype)).paths
        model, _ = _with_adapter(config, spec, dtype, isolation=paths.isolation)
        network = Network(
            model,
            paths.isolation,
            paths=paths,
            checkpointing=checkpointing,
            neftune_noise_alpha=spec.training.neftune_noise_alpha,
        )
        meta_values.boolean = paths.isolation != "mask"
        tracker = Tracker(
            rounding=ROUNDING if cuda else 1,
            vocabulary=model.config.get_text_config().vocab_size,
            workspaces=workspaces(cuda=cuda),
        )
        paged_bytes = run_largest_step(network, spec, step, tracker, cuda=cuda)
    categories = tracker.at_peak()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not cuda:
        return Memory(categories, sum(categories.values()), 0, trained)
    categories[Category.WORKSPACE] += CUBLAS_WORKSPACE_BYTES
    return Memory(categories, tracker.reserved() + rounded(CUBLAS_WORKSPACE_BYTES, LARGE_STEP), paged_bytes, trained)


def _with_adapter(
    config: Mapping[str, Any], spec: JobSpec, dtype: torch.dtype, isolation: Isolation | None = None
) -> tuple[PeftModel, Isolation]:
    """The base model with its adapter, and its isolation of documents: `isolation`, or the one probed on the model."""
    base = simulated_base(config, spec.quantization, dtype)
    if isolation is None:
        isolation = isolate_documents(base)
    elif isolation == "per_document":
        base.set_attn_implementation(PER_DOCUMENT)
    with META:
        return attach_adapter(base, spec.adapter, spec.training.seed), isolation
