"""The linear layers of a base that a loss reaches: an adapter on any other layer would never be trained.

Examples are the vision tower of a model that is trained on text, a pooler, and an indexer, whose output selects keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog
import torch
from transformers.pytorch_utils import Conv1D

from qlora_service.models.catalog.architecture import ROUTINE_TYPES

log = structlog.get_logger(__name__)

PROBE_TOKENS = 12
_EXPERT = re.compile(r"(?<=\bexperts\.)\d+")


def unreached_layers(base: Any) -> frozenset[str]:
    """Full names of the base's linear layers without a gradient, by one backward pass over a few tokens.

    Experts count together, because a few tokens are routed to some of them. Empty for `ROUTINE_TYPES`, and for a base
    that the pass fails on.
    """
    if base.config.model_type in ROUTINE_TYPES:
        return frozenset()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    was_training = base.training
    base.train()  # some architectures read a weight directly only while they are trained
    devices = [base.device] if base.device.type == "cuda" else []
    try:
        with _recording(layers) as reached, torch.random.fork_rng(devices), torch.enable_grad():
            vocabulary = base.config.get_text_config().vocab_size
            ids = torch.arange(1, PROBE_TOKENS + 1, device=base.device) % vocabulary
            base(input_ids=ids[None], use_cache=False).logits.float().sum().backward()
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, ValueError, KeyError, IndexError, RuntimeError, NotImplementedError) as error:
        log.warning("reach_not_measured", model=type(base).__name__, error=str(error))
        return frozenset()
    finally:
        base.train(was_training)
    kinds = {_EXPERT.sub("*", name) for name in reached}
    return frozenset(name for name in layers if _EXPERT.sub("*", name) not in kinds)


@contextmanager
def _recording(layers: dict[str, torch.nn.Module]) -> Iterator[set[str]]:
    """A block in which the names of layers are collected whose outputs receive a gradient."""
    reached: set[str] = set()

    def watch(name: str, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return output
        watched = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        if watched.requires_grad:  # unlike under `no_grad`
            watched.register_hook(lambda _: reached.add(name))
        return watched

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: watch(name, output))
        for name, module in layers.items()
    ]
    try:
        yield reached
    finally:
        for hook in hooks:
            hook.remove()
