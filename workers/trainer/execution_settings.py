"""How a training uses the device that it is on: the planner's choice, with what was measured as the last word."""

from __future__ import annotations

import torch

from qlora_service.errors import InvalidModel
from qlora_service.planning.cards import Device
from qlora_service.planning.fit import Choice, Question, chosen, longest_example_tokens
from qlora_service.planning.shapes import ModelShape
from qlora_service.specs import JobSpec
from qlora_service.training.device import device_name, free_memory_bytes, has_bf16
from qlora_service.training.network.network import Network


def starting_settings(network: Network, spec: JobSpec, longest_tokens: int) -> Choice:
    """Tokens at a time, and whether activations are recomputed, for rows of so many tokens at most.

    What the spec leaves to "auto" is chosen for a GPU's free memory. On a CPU, and for models that the formula was not
    fitted to, the tokens are those of a CPU.
    """
    if network.device.type == "cuda" and (question := _question(network, spec, longest_tokens)) is not None:
        return chosen(question, network.fits)
    tokens, wanted = spec.training.resolved_micro_batch_tokens, spec.training.gradient_checkpointing
    # A row longer than a micro-batch is one of its own; of a pair, both sides are.
    together = max(tokens, longest_example_tokens(spec, longest_tokens))
    return Choice(tokens, gradient_checkpointing=wanted is True or (wanted == "auto" and not network.fits(together)))


def _question(network: Network, spec: JobSpec, longest_tokens: int) -> Question | None:
    """The job on this GPU; None where the formula has nothing to say of it."""
    config = network.model.get_base_model().config.to_dict()
    try:
        question = Question(ModelShape.from_config(config), spec, this_gpu(network.device), longest_tokens)
    except InvalidModel:
        return None
    return question if question.formula_holds else None


def this_gpu(device: torch.device) -> Device:
    """The GPU, with what is free for this process: the base and the context are there already, and count as free."""
    _, total = torch.cuda.mem_get_info(device)
    found = Device(device_name(device), total, bf16=has_bf16(device))
    taken = torch.cuda.memory_allocated(device) + found.context_bytes
    return Device(found.name, total, free_bytes=free_memory_bytes(device) + taken, bf16=found.bf16)
