"""The shapes of a model, read from its config.json. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_service.errors import InvalidModel
from qlora_service.specs import JobSpec

Matrix = tuple[int, int]
"""(out, in) features of a linear layer"""

# transformers' names first, then those of GPT-2 and its descendants.
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_INTERMEDIATE = ("intermediate_size", "n_inner", "ffn_dim", "d_inner")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# Query, key and value layers of these have biases regardless of the config.
_BIASED = {"qwen2"}
# The head of these is the embedding unless the config says otherwise (transformers 5.23).
_TIED = ("gemma", "gpt2", "cohere", "smollm3")
_HEAD_NORMED = {"qwen3"}


@dataclass(frozen=True)
class ModelShape:
    """A Llama-like decoder; other architectures are treated as one."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    """The output head is the embedding"""
    max_positions: int | None = None
    attention_bias: bool = False
    head_norms: bool = False
    experts: int = 1
    """Experts per MLP. transformers keeps their matrices in one tensor, which bitsandbytes does not quantize"""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """The shapes in a decoded config.json.

        Raises:
            InvalidModel: a size is missing.
        """
        nested = config.get("text_config")
        # Multimodal models keep the language model's sizes in `text_config`.
        values = {**config, **nested} if isinstance(nested, Mapping) else config
        model_type = str(values.get("model_type", ""))
        hidden, heads = _size(values, _HIDDEN), _size(values, _HEADS)
        return cls(
            model_type=model_type,
            hidden=hidden,
            layers=_size(values, _LAYERS),
            heads=heads,
            kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or hidden // heads,
            intermediate=_optional(values, ("moe_intermediate_size",))
            or _optional(values, _INTERMEDIATE)
            or 4 * hidden,
            vocabulary=_size(values, ("vocab_size",)),
            tied=bool(values.get("tie_word_embeddings", model_type.startswith(_TIED))),
            max_positions=_optional(values, _POSITIONS),
            attention_bias=bool(values.get("attention_bias")) or model_type in _BIASED,
            head_norms=model_type in _HEAD_NORMED,
            experts=_optional(values, _EXPERTS) or 1,
        )

    @property
    def queries(self) -> int:
        """Features of all query heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Features of all key heads, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def matrices(self) -> dict[str, Matrix]:
        """The linear modules of a layer, by their names in Llama."""
        return {
            "q_proj": (self.queries, self.hidden),
            "k_proj": (self.keys, self.hidden),
            "v_proj": (self.keys, self.hidden),
            "o_proj": (self.hidden, self.queries),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    @property
    def parameters(self) -> int:
        """Weights of the whole model."""
        mlp = 3 * self.hidden * self.intermediate
        linear = sum(out * inside for out, inside in self.matrices.values()) + (self.experts - 1) * mlp
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * (linear + 2 * self.hidden) + embeddings + self.hidden

    def longest_tokens(self, spec: JobSpec) -> int:
        """The longest row that the spec allows and the model handles."""
        limit = spec.training.max_seq_len_tokens
        return limit if self.max_positions is None else min(limit, self.max_positions)


def _size(values: Mapping[str, Any], names: tuple[str, ...]) -> int:
    size = _optional(values, names)
    if size is None:
        raise InvalidModel(
            f"config.json has no {names[0]}: memory cannot be planned without it", location="/base_model"
        )
    return size


def _optional(values: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    sizes = (values.get(name) for name in names)
    return next((size for size in sizes if type(size) is int and size > 0), None)
