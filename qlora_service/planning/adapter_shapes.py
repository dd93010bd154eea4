"""The tensors of each adapter method, from a model's shapes. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

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
    PromptTuning,
    PTuning,
    TargetedAdapter,
    Training,
    Vera,
)
from qlora_service.training.sizes import EIGHT_BIT_BLOCK, FEWEST_8BIT_ELEMENTS, FEWEST_PAGED_ELEMENTS

FLOAT = 4
EMBEDDINGS = {"embed_tokens", "lm_head"}
LLAMA_ADAPTER_BOTTOM = 2
"""Layers that LLaMA-Adapter leaves alone by default (`models/adapters.py`)"""


@dataclass(frozen=True)
class AdapterShape:
    """Elements of each trained tensor, all float32: of every layer alike, and of none."""

    layers: int
    """That have an adapter"""
    by_module: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of one layer, by its linear modules"""
    elsewhere: tuple[int, ...] = ()
    frozen: int = 0
    """Elements that are not trained"""
    unsaved: int = 0
    """Elements, of either kind, that the published file does not need; less than 0 where it has some twice"""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """LoRA's, by module: features of x Aᵀ"""

    @property
    def tensors(self) -> list[int]:
        """Elements of every trained tensor."""
        of_layer = [elements for own in self.by_module.values() for elements in own]
        return of_layer * self.layers + [*self.elsewhere]

    @property
    def parameters(self) -> int:
        """Trained ones."""
        return sum(self.tensors)

    def layer_bytes(self, *modules: str) -> int:
        """The trained tensors of a layer's modules; without names, of all."""
        names = modules or tuple(self.by_module)
        return sum(rounded(FLOAT * elements) for name in names for elements in self.by_module.get(name, ()))

    @property
    def trained_bytes(self) -> int:
        """The trained tensors, as torch's allocator counts them; their gradients take as much."""
        return sum(rounded(FLOAT * elements) for elements in self.tensors)

    @property
    def stored_bytes(self) -> int:
        """The published file's tensors: plain float32."""
        return FLOAT * (self.parameters + self.frozen - self.unsaved)


def adapter_shape(adapter: Adapter, shape: ModelShape) -> AdapterShape:
    """What the method adds to a model of this shape."""
    layers, hidden = shape.layers, shape.hidden
    match adapter:
        case PromptTuning():
            return AdapterShape(0, elsewhere=(adapter.num_virtual_tokens * hidden,))
        case PrefixTuning():
            return AdapterShape(0, elsewhere=(adapter.num_virtual_tokens * layers * 2 * shape.keys,))
        case PTuning():
            width = adapter.encoder_hidden_size
            encoder = (hidden * width, width, width * width, width, width * hidden, hidden)
            # The prompt that the encoder makes is published, not the encoder.
            prompt = adapter.num_virtual_tokens * hidden
            return AdapterShape(0, elsewhere=(prompt, *encoder), unsaved=sum(encoder))
        case LlamaAdapter():
            upper = adapter.adapter_layers or max(1, layers - LLAMA_ADAPTER_BOTTOM)
            return AdapterShape(upper, {"self_attn": (adapter.adapter_len * hidden, 1)})
    assert isinstance(adapter, TargetedAdapter)
    return _targeted(adapter, shape)


def optimizer_bytes(training: Training, tensors: list[int], *, cuda: bool) -> tuple[int, int]:
    """The optimizer's state that stays on the device, and what can page to host memory."""
    moments = 1 if "lion" in training.optim else 2
    resident = paged = 0
    for elements in tensors:
        is_8bit = training.optim.endswith("8bit") and elements >= FEWEST_8BIT_ELEMENTS
        state = moments * elements * (1 if is_8bit else FLOAT)
        if cuda and training.optim.startswith("paged") and elements >= FEWEST_PAGED_ELEMENTS:
            paged += state
        else:
            resident += moments * rounded(state // moments, ROUNDING)
        if is_8bit:
            resident += moments * rounded(FLOAT * ceil(elements / EIGHT_BIT_BLOCK))
    return resident, paged


def _targeted(adapter: TargetedAdapter, shape: ModelShape) -> AdapterShape:
    asked = adapter.target_modules
    matrices = {name: sizes for name, sizes in shape.matrices.items() if isinstance(asked, str) or name in asked}
    match adapter:
        case Lora():
            rank = adapter.r * (2 if adapter.init_lora_weights == "olora" else 1)
            magnitude = adapter.use_dora
            tensors = {
                name: (rank * inside, out * rank, *((out,) if magnitude else ()))
                for name, (out, inside) in matrices.items()
            }
            # Trained tokens start from a copy of the base's.
            copied = len(adapter.trainable_token_indices or ()) * shape.hidden
            elsewhere, published_twice = _lora_elsewhere(adapter, shape, rank)
            return AdapterShape(
                shape.layers,
                tensors,
                elsewhere,
                frozen=copied,
                unsaved=copied - published_twice,
                ranks=dict.fromkeys(matrices, rank),
            )
        case AdaLora():
            rank = adapter.init_r
            tensors = {name: (rank * inside, out * rank, rank) for name, (out, inside) in matrices.items()}
            return AdapterShape(shape.layers, tensors, ranks=dict.fromkeys(matrices, rank))
        case IA3():
            inputs = adapter.feedforward_modules
            tensors = {name: (inside if name in inputs else out,) for name, (out, inside) in matrices.items()}
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


def _lora_elsewhere(adapter: Lora, shape: ModelShape, rank: int) -> tuple[tuple[int, ...], int]:
    """LoRA of the embedding and the head, one for both where they share a weight; and tokens that are trained.

    With the elements that the published file has twice: of a shared one, it has the embedding's and the head's.
    """
    named = EMBEDDINGS.intersection([] if isinstance(adapter.target_modules, str) else adapter.target_modules)
    pair = (rank * shape.vocabulary, shape.hidden * rank)
    pairs = pair * (bool(named) if shape.tied else len(named))
    tokens = adapter.trainable_token_indices
    own = () if tokens is None else (len(tokens) * shape.hidden,)
    return pairs + own, sum(pair) if shape.tied and named else 0
