"""Snapshot of a loaded base, to restore it after an adapter was attached, trained and detached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel


class BaseState:
    """The modules, hooks and settings of a base at the time of construction; of the weights only their addresses.

    PEFT's `unload` puts the original layers back. It leaves changed: the PEFT configuration that methods related to
    LoRA set, replaced forwards (`training.network.fused_modules`), the attention that prompt methods choose,
    activation checkpointing, and dropout rates.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._objects = [(obj, type(obj), vars(obj).copy(), _container_copies(obj)) for obj in _stateful_objects(model)]
        self._weights = [(weight, weight.data_ptr(), weight.requires_grad) for weight in model.parameters()]

    def restore(self) -> bool:
        """Restores everything; False if the memory address of a weight has changed: its data was replaced.

        A weight that was overwritten in place shows only in the fingerprint (`quantize.base_fingerprint`).
        """
        for obj, kind, attributes, containers in self._objects:
            if type(obj) is not kind:
                obj.__class__ = kind
            vars(obj).clear()
            vars(obj).update(attributes)
            for name, content in containers.items():
                container = attributes[name]
                container.clear()
                container.update(content)
        for weight, _, requires_grad in self._weights:
            weight.requires_grad_(requires_grad)
            weight.grad = None
        return all(weight.data_ptr() == address for weight, address, _ in self._weights)


def _stateful_objects(model: PreTrainedModel) -> Iterator[Any]:
    """The modules, and the configurations that they read."""
    seen: set[int] = set()
    for module in model.modules():
        yield module
        pending = [value for value in vars(module).values() if _is_configuration(value)]
        while pending:
            configuration = pending.pop()
            if id(configuration) not in seen:
                seen.add(id(configuration))
                yield configuration
                pending += [value for value in vars(configuration).values() if _is_configuration(value)]


def _is_configuration(value: object) -> bool:
    return type(value).__module__.startswith("transformers.") and type(value).__name__.endswith("Config")


def _container_copies(obj: Any) -> dict[str, Any]:
    """Copies of the object's own containers: children, parameters, hooks."""
    return {name: value.copy() for name, value in vars(obj).items() if isinstance(value, dict | set)}
