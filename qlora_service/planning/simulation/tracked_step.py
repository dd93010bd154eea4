"""A training step under the tracker: the training's own passes, on real tensors or on meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from torch.utils.hooks import RemovableHandle

from qlora_service.models.adapters import NAME as ADAPTER_NAME
from qlora_service.models.adapters import allocation_state, prune_after_step, trainable_parameters
from qlora_service.planning.largest_step import LargestStep
from qlora_service.planning.memory import Category
from qlora_service.planning.simulation.simulated_device import workspaces
from qlora_service.planning.simulation.tracker import Tracker
from qlora_service.specs import JobSpec, Objective
from qlora_service.training.network.micro_batch import LabeledRow, PreferencePair, TokenRow, TrainingExample
from qlora_service.training.network.network import Network
from qlora_service.training.objectives import evaluate, make_objective
from qlora_service.training.optimizer import make_optimizer
from qlora_service.training.sizes import MIN_PAGED_ELEMENTS
from qlora_service.training.step import backward_passes

PAGED_STATES = ("state1", "state2")
"""Keys of the optimizer state that can page (bitsandbytes 0.50, optim/optimizer.py, `get_state_buffer`)"""


def examples_of(step: LargestStep, objective: Objective) -> list[TrainingExample]:
    """Examples with the step's lengths; every token is trained, which gives the loss the most rows."""
    rows = [TokenRow(line, [1] * length, [True] * length) for line, length in enumerate(step.lengths, start=1)]
    if step.documents_per_example == 2:
        return [PreferencePair(*pair) for pair in zip(rows[::2], rows[1::2], strict=True)]
    if objective.type == "kto":
        return [LabeledRow(row, desirable=True) for row in rows]
    return list(rows)


def register_model(tracker: Tracker, model: PeftModel) -> list[RemovableHandle]:
    """Registers weights and constants with the tracker; returns the hooks that register gradients."""
    for name, module in model.named_modules():
        for local_name, parameter in module.named_parameters(recurse=False):
            tracker.register(parameter, _category(f"{name}.{local_name}", module, parameter))
            for constant in _constants(module, parameter):
                tracker.register(constant, Category.CONSTANTS)
        for local_name, buffer in module.named_buffers(recurse=False):
            tracker.register(buffer, _category(f"{name}.{local_name}", module, buffer))
    return [
        parameter.register_post_accumulate_grad_hook(lambda p: tracker.register(p.grad, Category.GRADIENTS))
        for parameter in trainable_parameters(model)
    ]


@contextmanager
def tracking(model: PeftModel, optimizer: torch.optim.Optimizer) -> Iterator[Tracker]:
    """The tracker, active during a step of a running training on a CPU. It does not change the step's results."""
    tracker = Tracker(vocabulary=model.config.get_text_config().vocab_size, workspaces=workspaces(cuda=False))
    hooks = register_model(tracker, model)
    _register_optimizer(tracker, optimizer, model, can_page=False)
    try:
        with tracker:
            yield tracker
    finally:
        for hook in hooks:
            hook.remove()


def run_largest_step(network: Network, spec: JobSpec, step: LargestStep, tracker: Tracker, *, cuda: bool) -> int:
    """Runs the step under the tracker as in the middle of a training; returns bytes of optimizer state that can page.

    The longest row is evaluated first, as between two steps of a training.
    """
    model, training = network.model, spec.training
    objective, examples = make_objective(spec.objective), examples_of(step, spec.objective)
    model.train()
    optimizer = make_optimizer(model, training, network.device)
    if training.optim == "adamw_torch":
        for group in optimizer.param_groups:
            group["foreach"] = cuda  # torch's own choice depends on the device of the parameters
    _set_zero_gradients(model)
    _update(optimizer, model)
    optimizer.zero_grad(set_to_none=True)
    register_model(tracker, model)
    can_page = cuda and training.optim.startswith("paged")
    paged_bytes = _register_optimizer(tracker, optimizer, model, can_page=can_page)
    with tracker:
        evaluate(network, objective, examples[:1])
        if not step.is_whole_step:
            _set_zero_gradients(model)
            for parameter in trainable_parameters(model):
                assert parameter.grad is not None
                tracker.register(parameter.grad, Category.GRADIENTS)
        for _ in backward_passes(network, objective, examples, [range(len(examples))]):
            pass
        with tracker.during(Category.OPTIMIZER):
            torch.nn.utils.clip_grad_norm_(trainable_parameters(model), training.max_grad_norm)
            _update(optimizer, model)
    return paged_bytes


def _set_zero_gradients(model: PeftModel) -> None:
    for parameter in trainable_parameters(model):
        parameter.grad = torch.zeros_like(parameter)


def _update(optimizer: torch.optim.Optimizer, model: PeftModel) -> None:
    optimizer.step()
    prune_after_step(model, 1)


def _register_optimizer(tracker: Tracker, optimizer: torch.optim.Optimizer, model: PeftModel, *, can_page: bool) -> int:
    """Registers resident state of the optimizer and of AdaLoRA; returns bytes of state that can page."""
    paged = 0
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if not isinstance(value, torch.Tensor):
                continue
            if can_page and key in PAGED_STATES and parameter.numel() >= MIN_PAGED_ELEMENTS:
                paged += value.nbytes
            else:
                tracker.register(value, Category.OPTIMIZER)
    for value in allocation_state(model).values():
        tracker.register(value, Category.OPTIMIZER)
    return paged


def _category(name: str, module: torch.nn.Module, tensor: torch.Tensor) -> Category:
    if ADAPTER_NAME in name.split("."):
        return Category.ADAPTER
    packed = isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) and not tensor.is_floating_point()
    return Category.WEIGHTS if packed else Category.UNQUANTIZED


def _constants(module: torch.nn.Module, parameter: Any) -> list[torch.Tensor]:
    """The quantization constants and codes of a quantized weight."""
    if (state := getattr(parameter, "quant_state", None)) is not None:
        nested = (state.state2.absmax, state.state2.code, state.offset) if state.nested else ()
        return [state.absmax, state.code, *nested]
    if isinstance(module, bnb.nn.Linear8bitLt):
        # The first forward pass moves them from the weight to the layer's state.
        scales = (getattr(parameter, "SCB", None), module.state.SCB)
        return [scale for scale in scales if isinstance(scale, torch.Tensor)]
    return []
