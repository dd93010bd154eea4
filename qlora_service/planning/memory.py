"""Device memory of a training, by category."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

MIB = 2**20
GIB = 2**30
FLOAT32_BYTES = 4


class Category(StrEnum):
    """The purpose of allocated bytes."""

    WEIGHTS = "packed weights"
    """Quantized matrices of the base model"""
    CONSTANTS = "quantization constants"
    UNQUANTIZED = "unquantized parts"
    """Embeddings, head, norms, biases; the whole base model if it is not quantized"""
    ADAPTER = "adapter"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    """Optimizer state that stays on the device"""
    ACTIVATIONS = "saved activations"
    """Allocated in the forward pass and kept for the backward pass"""
    RECOMPUTATION = "recomputation"
    """Allocated in the backward pass: recomputed activations, and gradients of activations"""
    DEQUANTIZATION = "dequantization buffers"
    """Matrices dequantized for one product"""
    LOGITS = "logits and loss"
    WORKSPACE = "workspace"
    """Temporary buffers of kernels"""


@dataclass(frozen=True)
class Memory:
    """Bytes of a training at its peak."""

    categories: Mapping[Category, int]
    reserved: int
    """Bytes held by torch's allocator at its own peak: never less than `allocated`"""
    host: int
    """Optimizer state in CUDA's managed memory: on the device if there is room, else in host memory"""
    trained_parameters: int

    @property
    def allocated(self) -> int:
        """torch's `max_memory_allocated`; on a CPU, the peak bytes of tensors."""
        return sum(self.categories.values())

    @property
    def largest_category(self) -> Category:
        return max(self.categories, key=lambda category: self.categories[category])

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"categories": {str(category): size for category, size in self.categories.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Memory:
        """The memory that `as_dict` wrote."""
        return cls(**{**values, "categories": {Category(name): size for name, size in values["categories"].items()}})
