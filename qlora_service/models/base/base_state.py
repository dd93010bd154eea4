"""A loaded base put back to what it was, after an adapter was attached, trained and taken off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel


class BaseState:
    """What the base is made of, taken when it was loaded: modules, hooks, settings; the weights only by their place.

    PEFT's `unload` gives back the layers. What stays behind is its configuration on LoRA's sisters, forwards that were
    replaced (`training.fused_modules`), the attention that prompt methods choose, recomputation, and dropout rates.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._objects = [(thing, type(thing), vars(thing).copy(), _contents(thing)) for thing in _parts(model)]
        self._weights = [(weight, weight.data_ptr(), weight.requires_grad) for weight in model.parameters()]

    def restore(self) -> bool:
        """Put everything back; False when a weight now lies elsewhere, so that another has taken its place.

        Weights that were written over show in the fingerprint only (`nf4.base_fingerprint`).
        """
        for thing, kind, attributes, contents in self._objects:
            if type(thing) is not kind:
                thing.__class__ = kind
            vars(thing).clear()
            vars(thing).update(attributes)
            for name, content in contents.items():
                container = attributes[name]
                container.clear()
                container.update(content)
        for weight, _, is_trained in self._weights:
            weight.requires_grad_(is_trained)
            weight.grad = None
        return all(weight.data_ptr() == place for weight, place, _ in self._weights)


def _parts(model: PreTrainedModel) -> Iterator[Any]:
    """The modules, and the configurations they read."""
    seen: set[int] = set()
    for module in model.modules():
        yield module
        found = [value for value in vars(module).values() if _is_configuration(value)]
        while found:
            configuration = found.pop()
            if id(configuration) not in seen:
                seen.add(id(configuration))
                yield configuration
                found += [value for value in vars(configuration).values() if _is_configuration(value)]


def _is_configuration(value: object) -> bool:
    return type(value).__module__.startswith("transformers.") and type(value).__name__.endswith("Config")


def _contents(thing: Any) -> dict[str, Any]:
    """What is in the object's own containers: children, parameters, hooks."""
    return {name: value.copy() for name, value in vars(thing).items() if isinstance(value, dict | set)}
