"""The linear layers of a base on which an adapter would be of no use.

No loss on text reaches a vision tower, a pooler, or an indexer, whose output selects keys. And PEFT 0.21 renames the
keys of an adapter that it loads by transformers' patterns for published weights: where a pattern matches the loaded
model's own names too, these weights are lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog
import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import build_peft_weight_mapping
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from qlora_service.models.catalog.architecture import ROUTINE_TYPES

log = structlog.get_logger(__name__)

NAME = "default"
"""PEFT's name of an adapter without a name"""
PROBE_TOKENS = 12
_EXPERT = re.compile(r"(?<=\bexperts\.)\d+")


def useless_layers(base: Any) -> frozenset[str]:
    """Full names of the linear layers whose adapter would not be trained, or not loaded; none in `ROUTINE_TYPES`."""
    if base.config.model_type in ROUTINE_TYPES:
        return frozenset()
    return unreached_layers(base) | unloadable_layers(base)


def unreached_layers(base: Any) -> frozenset[str]:
    """Full names of the base's linear layers without a gradient, by one backward pass over a few tokens.

    Experts count together, because a few tokens are routed to some of them. Empty for a base that the pass fails on.
    """
    layers = _linear_layers(base)
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
        if base.device.type != "meta":  # a simulation cannot run every architecture
            log.warning("reach_not_measured", model=type(base).__name__, error=str(error))
        return frozenset()
    finally:
        base.train(was_training)
    kinds = {_EXPERT.sub("*", name) for name in reached}
    return frozenset(name for name in layers if _EXPERT.sub("*", name) not in kinds)


def unloadable_layers(base: Any) -> frozenset[str]:
    """Full names of the base's linear layers whose LoRA weights PEFT would load under other names."""
    if get_checkpoint_conversion_mapping(base.config.model_type) is None:
        return frozenset()
    conversions = build_peft_weight_mapping(get_model_conversion_mapping(base), NAME, LoraConfig()) or []
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    unloadable = set()
    for name in _linear_layers(base):
        key = f"base_model.model.{name}.lora_A.weight"
        renamed = rename_source_key(key, renamings, converters)[0]
        if not key.endswith(renamed.replace(f".{NAME}", "")):  # PEFT undoes the removal of a prefix
            unloadable.add(name)
    return frozenset(unloadable)


def _linear_layers(base: Any) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}


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
