"""A tiny random model of every class in transformers' causal-LM mapping, with the tests' tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qlora_service.models.catalog.miniature import miniature
from tests.tiny_model import tiny_tokenizer

FAMILIES: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""The class's name by model type"""
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_QSA = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
    "indexer_compress_ratio": 4, "ngram_vocab_size_base": 512, "split_ngram_parts": 2, "hc_lowrank": 8,
}  # fmt: skip
_GEMMA_3N = {
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA,
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots3_note": {"text_config": {"head_dim": 32}},
    "dots3_note_text": {"head_dim": 32},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "gemma3n": {"text_config": _GEMMA_3N},
    "gemma3n_text": _GEMMA_3N,
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "granitemoehybrid": _MAMBA,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"qk_head_dim": 32},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2},
    "qwen4_exp": {"text_config": _QSA},
    "qwen4_exp_text": _QSA,
    "recurrent_gemma": {"num_key_value_heads": 1},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [16, 48]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128, "attention_head_dim": 32,
    },
    "zamba2": {
        "mamba_headdim": 16, "attention_hidden_size": 128, "attention_head_dim": 32, "kv_channels": 16,
        "num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [2, 5],
    },
}  # fmt: skip
"""Fields that the general reduction does not reach, by model type"""


def tiny_config(model_type: str) -> PretrainedConfig:
    """The class's default config, reduced. Raises what transformers raises for it."""
    kind = CONFIG_MAPPING[model_type]
    small = miniature(kind().to_dict())
    for level in (small, small.get("text_config") or {}):
        level.update({name: value for name, value in TOKENS.items() if name in level or level is small})
    return kind.from_dict(_merged(small, SPECIAL.get(model_type, {})))


def build(model_type: str, path: Path) -> Path:
    """`path` as a model directory with random bf16 weights. Raises what transformers raises."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            # Norms, biases and decays with an effect: many architectures start them at zero or one.
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model = model.to(torch.bfloat16)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def _merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The config with the changes; nested ones change single fields of a nested config."""
    merged = dict(config)
    for name, value in changes.items():
        nested = isinstance(value, dict) and isinstance(config.get(name), dict)
        merged[name] = _merged(config[name], value) if nested else value
    return merged
