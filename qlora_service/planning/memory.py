"""What a training takes of the device's memory, by what it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

MIB = 2**20
GIB = 2**30


class Category(StrEnum):
    """What bytes are for."""

    WEIGHTS = "packed weights"
    """The base's quantized matrices"""
    CONSTANTS = "quantization constants"
    UNQUANTIZED = "unquantized parts"
    """Embeddings, head, norms, biases; everything, where the base is not quantized"""
    ADAPTER = "adapter"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    """State that stays on the device"""
    ACTIVATIONS = "saved activations"
    """Made by the forward pass and still there"""
    RECOMPUTATION = "recomputation"
    """Made by the backward pass: activations computed again, and gradients of activations"""
    DEQUANTIZATION = "dequantization buffers"
    """Matrices unpacked for one product"""
    LOGITS = "logits and loss"
    WORKSPACE = "workspace"
    """What kernels take for themselves"""


@dataclass(frozen=True)
class Memory:
    """A training's bytes at the moment it needs most."""

    categories: Mapping[Category, int]
    reserved: int
    """What torch's allocator holds to serve them, at its own peak: never less than `allocated`"""
    host: int
    """Optimizer state in CUDA's managed memory: on the device while there is room, in host memory when there is not"""
    trained_parameters: int

    @property
    def allocated(self) -> int:
        """torch's `max_memory_allocated`; on a CPU, the most bytes of tensors."""
        return sum(self.categories.values())

    @property
    def largest(self) -> Category:
        """What takes most."""
        return max(self.categories, key=lambda category: self.categories[category])

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"categories": {str(category): size for category, size in self.categories.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Memory:
        """What `as_dict` gave."""
        return cls(**{**values, "categories": {Category(name): size for name, size in values["categories"].items()}})
