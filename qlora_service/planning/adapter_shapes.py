"""The tensors of each adapter method, from the shapes of a model. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

from qlora_service.planning.memory import FLOAT32_BYTES
from qlora_service.planning.shapes import ModelShape
from qlora_service.planning.simulation.allocator import ROUNDING, rounded
from qlora_service.specs import (
    IA3,
    AdaLora,
    Adapter,
    LlamaAdapter,
    Lora,
    Oft,
    PrefixTuning,
    PromptMethod,
    PromptTuning,
    PTuning,
    TargetedAdapter,
    Training,
    Vera,
)
from qlora_service.specs.adapter import LLAMA_ADAPTER_SKIPPED_LAYERS
from qlora_service.training.sizes import EIGHT_BIT_BLOCK, MIN_8BIT_ELEMENTS, MIN_PAGED_ELEMENTS

EMBEDDINGS = {"embed_tokens", "lm_head"}
ADALORA_STATISTICS = 3
"""Tensors that AdaLoRA keeps for each trained one: importance, and its mean and deviation over the steps"""


@dataclass(frozen=True)
class AdapterShape:
    """Elements of each trained tensor, all float32: the same in every adapted layer, and outside the layers."""

    layers: int
    """Number of adapted layers"""
    by_module: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Elements of the trained tensors of one layer, by linear module"""
    outside_layers: tuple[int, ...] = ()
    frozen: int = 0
    """Elements of the adapter that are not trained"""
    unsaved: int = 0
    """Elements, trained or frozen, that the published file omits; negative where the file stores some twice"""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Features of x Aᵀ in LoRA, by module"""

    @property
    def tensors(self) -> list[int]:
        """Elements of every trained tensor."""
        layer_tensors = [elements for tensors in self.by_module.values() for elements in tensors]
        return layer_tensors * self.layers + [*self.outside_layers]

    @property
    def trained_parameters(self) -> int:
        return sum(self.tensors)

    def layer_bytes(self, *modules: str) -> int:
        """Bytes of the trained tensors of these modules of one layer; without names, of all its modules."""
        names = modules or tuple(self.by_module)
        return sum(rounded(FLOAT32_BYTES * elements) for name in names for elements in self.by_module.get(name, ()))

    @property
    def trained_bytes(self) -> int:
        """Bytes of the trained tensors in torch's allocator; their gradients take the same."""
        return sum(rounded(FLOAT32_BYTES * elements) for elements in self.tensors)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the published file's tensors, in float32."""
        return FLOAT32_BYTES * (self.trained_parameters + self.frozen - self.unsaved)


def adapter_shape(adapter: Adapter, shape: ModelShape) -> AdapterShape:
    """The tensors that the method adds to a model of this shape."""
    layers, hidden = shape.layers, shape.hidden
    match adapter:
        case PromptTuning():
            return AdapterShape(0, outside_layers=(adapter.num_virtual_tokens * hidden,))
        case PrefixTuning():
            return AdapterShape(0, outside_layers=(adapter.num_virtual_tokens * layers * 2 * shape.keys,))
        case PTuning():
            width = adapter.encoder_hidden_size
            encoder = (hidden * width, width, width * width, width, width * hidden, hidden)
            # The prompt that the encoder computes is published, not the encoder.
            prompt = adapter.num_virtual_tokens * hidden
            return AdapterShape(0, outside_layers=(prompt, *encoder), unsaved=sum(encoder))
        case LlamaAdapter():
            adapted_layers = adapter.adapter_layers or max(1, layers - LLAMA_ADAPTER_SKIPPED_LAYERS)
            return AdapterShape(adapted_layers, {"self_attn": (adapter.adapter_len * hidden, 1)})
    assert isinstance(adapter, TargetedAdapter)
    return _targeted(adapter, shape)


def optimizer_bytes(training: Training, tensors: list[int], *, cuda: bool) -> tuple[int, int]:
    """(bytes of optimizer state that stay on the device, bytes that can page to host memory)."""
    moments = 1 if "lion" in training.optim else 2
    resident = paged = 0
    for elements in tensors:
        is_8bit = training.optim.endswith("8bit") and elements >= MIN_8BIT_ELEMENTS
        state = moments * elements * (1 if is_8bit else FLOAT32_BYTES)
        if cuda and training.optim.startswith("paged") and elements >= MIN_PAGED_ELEMENTS:
            paged += state
        else:
            resident += moments * rounded(state // moments, ROUNDING)
        if is_8bit:
            resident += moments * rounded(FLOAT32_BYTES * ceil(elements / EIGHT_BIT_BLOCK))
    return resident, paged


def virtual_tokens(adapter: Adapter) -> int:
    """Positions that a prompt method inserts before each document."""
    return adapter.num_virtual_tokens if isinstance(adapter, PromptMethod) and adapter.method != "prefix_tuning" else 0


def _targeted(adapter: TargetedAdapter, shape: ModelShape) -> AdapterShape:
    targets = adapter.target_modules
    matrices = {name: sizes for name, sizes in shape.matrices.items() if isinstance(targets, str) or name in targets}
    match adapter:
        case Lora():
            rank = adapter.r * (2 if adapter.init_lora_weights == "olora" else 1)
            has_magnitude = adapter.use_dora
            tensors = {
                name: (rank * inside, out * rank, *((out,) if has_magnitude else ()))
                for name, (out, inside) in matrices.items()
            }
            # Trained tokens start from a copy of the base's.
            copied = len(adapter.trainable_token_indices or ()) * shape.hidden
            outside_layers, stored_twice = _lora_outside_layers(adapter, shape, rank)
            return AdapterShape(
                shape.layers,
                tensors,
                outside_layers,
                frozen=copied,
                unsaved=copied - stored_twice,
                ranks=dict.fromkeys(matrices, rank),
            )
        case AdaLora():
            rank = adapter.init_r
            tensors = {name: (rank * inside, out * rank, rank) for name, (out, inside) in matrices.items()}
            return AdapterShape(shape.layers, tensors, ranks=dict.fromkeys(matrices, rank))
        case IA3():
            scaled_inputs = adapter.feedforward_modules
            tensors = {name: (inside if name in scaled_inputs else out,) for name, (out, inside) in matrices.items()}
            return AdapterShape(shape.layers, tensors)
        case Vera():
            widest = [max(sizes) for sizes in zip(*matrices.values(), strict=True)]
            vectors = {name: (out, adapter.r) for name, (out, _) in matrices.items()}
            ranks = dict.fromkeys(matrices, adapter.r)
            return AdapterShape(shape.layers, vectors, frozen=adapter.r * sum(widest), ranks=ranks)
        case Oft():
            size = adapter.oft_block_size
            blocks = {name: (inside // size * (size * (size - 1) // 2),) for name, (_, inside) in matrices.items()}
            return AdapterShape(shape.layers, blocks)
    raise AssertionError(f"no shapes for {adapter!r}")


def _lora_outside_layers(adapter: Lora, shape: ModelShape, rank: int) -> tuple[tuple[int, ...], int]:
    """(elements of LoRA tensors of embedding and head and of trained tokens, elements that the file stores twice).

    An embedding and a head that share a weight share one LoRA; the published file has it under both names.
    """
    targets = EMBEDDINGS.intersection([] if isinstance(adapter.target_modules, str) else adapter.target_modules)
    pair = (rank * shape.vocabulary, shape.hidden * rank)
    pairs = pair * (bool(targets) if shape.tied else len(targets))
    token_ids = adapter.trainable_token_indices
    token_rows = () if token_ids is None else (len(token_ids) * shape.hidden,)
    return pairs + token_rows, sum(pair) if shape.tied and targets else 0
