"""What a layer keeps, and has beside it, where it is not one of the fast path: by adapter method. Pure arithmetic.

Bytes per token and feature, in bfloat16; read off the code, and equal to the simulator's differences between models of
other widths (32,768 tokens).
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_service.planning.shapes import ModelShape
from qlora_service.specs import Adapter, JobSpec, Lora, PromptMethod

FAST_LAYERS = {"llama", "mistral", "qwen2", "qwen3"}
"""Model types whose layers the fast path takes (`training/llama_layers.py`)"""
FLOAT = 4


@dataclass(frozen=True)
class LayerCost:
    """How a layer is computed."""

    of_input: float = 0
    """Kept for each adapted module, per input feature"""
    of_output: float = 0
    rank_width: int | None = None
    """Bytes of x Aᵀ; None: the compute dtype's"""
    keeps_inputs: bool = False
    """Of the frozen products too: normed hidden states, and what the MLP's last matrix reads"""
    survives_checkpointing: bool = False
    """bitsandbytes' int8 product keeps its input where checkpointing cannot free it (autograd/_functions.py)"""
    beside: tuple[float, float] = (0, 0)
    """Per hidden and per intermediate feature, at the highest moment of the last layer"""
    beside_recomputed: tuple[float, float] = (0, 0)
    """The same with checkpointing"""
    per_weight: float = 2
    """Of an MLP matrix, unpacked for a product"""


FAST = LayerCost()
GENERAL = LayerCost(keeps_inputs=True, beside=(14, 4), beside_recomputed=(4, 6))
INT8 = LayerCost(
    of_input=4, rank_width=4, keeps_inputs=True, survives_checkpointing=True,
    beside=(14, 4), beside_recomputed=(2, 2), per_weight=0,
)  # fmt: skip
DROPOUT = LayerCost(of_input=3, beside=(5, 5), beside_recomputed=(2, 5))
DORA = LayerCost(
    of_input=4, of_output=6, rank_width=4, beside=(-6, 12), beside_recomputed=(-4, 12), per_weight=22
)  # fmt: skip
BY_METHOD = {
    "adalora": LayerCost(of_input=4, rank_width=4, beside=(4, 6), beside_recomputed=(12, 6), per_weight=0),
    "ia3": LayerCost(of_output=4, beside=(6, 10), beside_recomputed=(10, 8), per_weight=0),
    "vera": LayerCost(of_output=4, rank_width=4, beside=(-2, 12), beside_recomputed=(2, 12), per_weight=0),
    "oft": LayerCost(of_input=4, beside=(2, 10), beside_recomputed=(2, 8), per_weight=0),
    "prompt_tuning": LayerCost(keeps_inputs=True, beside=(20, 6), beside_recomputed=(4, 6)),
}
"""PEFT's own layers: inputs or outputs in float32. Methods that have no layer of their own are as prompt tuning."""


def layer_cost(spec: JobSpec, shape: ModelShape) -> LayerCost:
    """How the job's layers are computed, as far as it can be known without the model."""
    adapter = spec.adapter
    if not isinstance(adapter, Lora):
        return BY_METHOD.get(adapter.method, BY_METHOD["prompt_tuning"])
    if spec.quantization.type == "int8":
        return INT8
    if adapter.use_dora:
        return DORA
    if adapter.lora_dropout:
        return DROPOUT
    return FAST if shape.model_type in FAST_LAYERS else GENERAL


def virtual_tokens(adapter: Adapter) -> int:
    """Positions that a prompt method puts before each document."""
    return adapter.num_virtual_tokens if isinstance(adapter, PromptMethod) and adapter.method != "prefix_tuning" else 0


def resolved_dtype(spec: JobSpec, *, cuda: bool, auto: str | None = None) -> str:
    """The precision of the maths where "auto" means `auto`, or what it means on recent hardware."""
    asked = spec.quantization.compute_dtype
    return asked if asked != "auto" else auto or ("bfloat16" if cuda else "float32")
