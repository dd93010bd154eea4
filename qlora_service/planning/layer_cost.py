"""Bytes that a decoder layer keeps and needs, by adapter method and quantization. Pure arithmetic.

Figures are bytes per token and feature in bfloat16. They were read off the code, and equal the differences between
simulations of models of different widths (32,768 tokens).
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_service.planning.shapes import ModelShape
from qlora_service.specs import JobSpec, Lora

FAST_LAYERS = {"llama", "mistral", "qwen2", "qwen3"}
"""Model types whose layers have a fast path (`training/network/llama_layers.py`)"""


@dataclass(frozen=True)
class LayerCost:
    """Bytes that a layer saves beyond the fast path, and bytes that its backward pass adds to the saved ones."""

    per_input_feature: float = 0
    """Bytes kept per token and input feature of each adapted module"""
    per_output_feature: float = 0
    """Bytes kept per token and output feature of each adapted module"""
    rank_width: int | None = None
    """Bytes per element of x Aᵀ; None: the width of the compute dtype"""
    keeps_inputs: bool = False
    """Keeps inputs of frozen products as well: normed hidden states, and the input of the MLP's last matrix"""
    survives_checkpointing: bool = False
    """bitsandbytes' int8 product keeps its input where checkpointing cannot free it (autograd/_functions.py)"""
    extra: tuple[float, float] = (0, 0)
    """Added at the peak of the last layer: bytes per token and hidden feature, and per token and MLP feature"""
    extra_with_checkpointing: tuple[float, float] = (0, 0)
    """`extra` where activations are recomputed"""
    per_mlp_weight: float = 2
    """Bytes per weight of an MLP matrix that is dequantized for a product"""


FAST = LayerCost()
GENERAL = LayerCost(keeps_inputs=True, extra=(14, 4), extra_with_checkpointing=(4, 6))
INT8 = LayerCost(
    per_input_feature=4, rank_width=4, keeps_inputs=True, survives_checkpointing=True,
    extra=(14, 4), extra_with_checkpointing=(2, 2), per_mlp_weight=0,
)  # fmt: skip
DROPOUT = LayerCost(per_input_feature=3, extra=(5, 5), extra_with_checkpointing=(2, 5))
DORA = LayerCost(
    per_input_feature=4, per_output_feature=6, rank_width=4,
    extra=(-6, 12), extra_with_checkpointing=(-4, 12), per_mlp_weight=22,
)  # fmt: skip
BY_METHOD = {
    "adalora": LayerCost(
        per_input_feature=4, rank_width=4, extra=(4, 6), extra_with_checkpointing=(12, 6), per_mlp_weight=0
    ),
    "ia3": LayerCost(per_output_feature=4, extra=(6, 10), extra_with_checkpointing=(10, 8), per_mlp_weight=0),
    "vera": LayerCost(
        per_output_feature=4, rank_width=4, extra=(-2, 12), extra_with_checkpointing=(2, 12), per_mlp_weight=0
    ),
    "oft": LayerCost(per_input_feature=4, extra=(2, 10), extra_with_checkpointing=(2, 8), per_mlp_weight=0),
    "prompt_tuning": LayerCost(keeps_inputs=True, extra=(20, 6), extra_with_checkpointing=(4, 6)),
}
"""PEFT's own layers, with inputs or outputs in float32. Methods that are not listed cost as prompt tuning does"""


def layer_cost(spec: JobSpec, shape: ModelShape) -> LayerCost:
    """The cost of the job's layers, as far as the config determines it."""
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
