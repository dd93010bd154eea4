"""A miniature of a model's config.json: the same architecture and switches, small enough to run in a moment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VOCABULARY = 512
HIDDEN, HEADS, HEAD_DIM = 64, 4, 16
LAYERS = 4
"""Largest number of layers; layers of every kind that `layer_types` and similar lists name come first"""

_LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
    "num_decoder_layers", "num_encoder_layers", "num_blocks",
)  # fmt: skip
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = {"num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads", "num_query_groups"}
_LARGEST = (
    dict.fromkeys(_LAYER_COUNTS, LAYERS)
    | dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim", "embedding_size", "word_embed_proj_dim",
         "input_embedding_size", "output_embedding_size", "attention_hidden_size", "lru_width", "dim",
         "backbone_hidden_size", "dim_model_base", "adapter_in_dim", "adapter_out_dim", "adapter_input_size",
         "adapter_output_size"),
        HIDDEN,
    )
    | dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
         "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads",
         "swa_num_attention_heads", "linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"),
        HEADS,
    )
    | dict.fromkeys(
        ("head_dim", "d_kv", "d_head", "dim_head", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim",
         "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "swa_head_dim", "index_head_dim",
         "attention_head_size", "kv_channels", "global_head_dim", "mamba_head_dim", "mamba_d_head",
         "indexer_head_dim"),
        HEAD_DIM,
    )
    | dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "d_inner",
         "ffn_hidden_size", "feed_forward_size", "moe_intermediate_size", "shared_expert_intermediate_size",
         "moe_shared_expert_intermediate_size", "intermediate_size_mlp", "expert_ffn_hidden_size",
         "dense_intermediate_size", "shared_intermediate_size", "dim_ff", "shared_experts_intermediate_size"),
        2 * HIDDEN,
    )
    | dict.fromkeys(
        ("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size",
         "encoder_hash_byte_group_vocab", "shape_vocab_size", "pronunciation_vocab_size"),
        VOCABULARY,
    )
    | dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num"), 4)
    | dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "topk_group", "n_group",
         "num_expert_group"),
        2,
    )
    | dict.fromkeys(("rotary_dim",), HEAD_DIM // 2)
    | dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 16)
    | dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 512)
)  # fmt: skip


def miniature(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with its sizes reduced; nested configs are reduced too.

    Raises nothing: what is not recognized stays, so that building the model may fail.
    """
    layers = next((config[name] for name in _LAYER_COUNTS if isinstance(config.get(name), int)), 0)
    kept = _kept_layers(config, layers)
    heads = next((config[name] for name in _HEADS if isinstance(config.get(name), int)), None)
    small: dict[str, Any] = {}
    for name, value in config.items():
        if name == "per_layer_config" and isinstance(value, Mapping):
            by_layer = {int(layer): miniature(fields) for layer, fields in value.items()}
            small[name] = {str(new): by_layer[old] for new, old in enumerate(kept) if old in by_layer}
        elif isinstance(value, Mapping):
            small[name] = miniature(value) if name.endswith("_config") else value
        elif name in _KV_HEADS and type(value) is int:
            small[name] = HEADS if value == heads else min(value, HEADS // 2)
        elif name in _LARGEST and type(value) is int:
            small[name] = min(value, _LARGEST[name])
        elif name.endswith(("_token_id", "_token_index")) and type(value) is int:
            small[name] = value % VOCABULARY
        elif _is_per_layer(value, layers):
            largest = _LARGEST.get(name)
            small[name] = [value[layer] if largest is None else min(value[layer], largest) for layer in kept]
        else:
            small[name] = value
    for name in _LAYER_COUNTS:
        if name in small and config[name] == layers:
            small[name] = len(kept)
    return small


def _is_per_layer(value: Any, layers: int) -> bool:
    return isinstance(value, (list, tuple)) and layers > 0 and len(value) == layers


def _kept_layers(config: Mapping[str, Any], layers: int) -> list[int]:
    """Indices of the layers that stay: the first of each kind, then the first ones."""
    lists = [value for value in config.values() if _is_per_layer(value, layers)]
    first_of_kind: dict[str, int] = {}
    for layer in range(layers):
        first_of_kind.setdefault(repr([values[layer] for values in lists]), layer)
    chosen = [*first_of_kind.values(), *(layer for layer in range(layers) if layer not in first_of_kind.values())]
    return sorted(chosen[:LAYERS])
