"""Micro-batch size and gradient checkpointing for the device at hand: the planner's choice, checked by measurement."""

from __future__ import annotations

import torch

from qlora_service.errors import InvalidModel
from qlora_service.planning.cards import Device
from qlora_service.planning.fit import Choice, FitQuestion, choose_settings, longest_example_tokens
from qlora_service.planning.shapes import ModelShape
from qlora_service.specs import JobSpec
from qlora_service.training.device import device_name, free_memory_bytes, has_bf16
from qlora_service.training.network.network import Network


def starting_settings(network: Network, spec: JobSpec, longest_tokens: int) -> Choice:
    """Micro-batch tokens and gradient checkpointing for rows of at most `longest_tokens`.

    On a GPU, "auto" in the spec is resolved by its free memory. On a CPU, and for models that the memory formula was
    not fitted to, the micro-batch is that of a CPU.
    """
    if network.device.type == "cuda" and (question := _question(network, spec, longest_tokens)) is not None:
        return choose_settings(question, network.fits)
    training = spec.training
    tokens, checkpointing = training.resolved_micro_batch_tokens, training.gradient_checkpointing
    # A row longer than the micro-batch is a micro-batch by itself; so are both sides of a pair.
    largest_tokens = max(tokens, longest_example_tokens(spec, longest_tokens))
    return Choice(
        tokens,
        gradient_checkpointing=checkpointing is True or (checkpointing == "auto" and not network.fits(largest_tokens)),
    )


def _question(network: Network, spec: JobSpec, longest_tokens: int) -> FitQuestion | None:
    """The planner's question about the job on this GPU; None if the memory formula does not hold for the model."""
    config = network.model.get_base_model().config.to_dict()
    try:
        question = FitQuestion(ModelShape.from_config(config), spec, _this_gpu(network.device), longest_tokens)
    except InvalidModel:
        return None
    return question if question.formula_holds else None


def _this_gpu(device: torch.device) -> Device:
    """The GPU with the memory available to this process: free bytes plus the base and CUDA context already on it."""
    _, total_bytes = torch.cuda.mem_get_info(device)
    gpu = Device(device_name(device), total_bytes, bf16=has_bf16(device))
    own_bytes = torch.cuda.memory_allocated(device) + gpu.context_bytes
    return Device(gpu.name, total_bytes, free_bytes=free_memory_bytes(device) + own_bytes, bf16=gpu.bf16)
