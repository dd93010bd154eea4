"""Tiny models of architectures whose layers are not all ordinary linear layers: experts, routers, Mamba."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.tiny_model import MAX_POSITIONS, VOCABULARY_SIZE, build_tiny_model

_SIZES = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_POSITIONS,
}
_EXPERTS = {"num_experts_per_tok": 2}
_DEEPSEEK = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 48, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": _EXPERTS | _DEEPSEEK | {
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
        "head_dim": 8,
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1},
    "glm4_moe": _EXPERTS | _DEEPSEEK | {"num_key_value_heads": 2},
    "gpt_oss": _EXPERTS | {"num_local_experts": 4},
    "granitemoe": _EXPERTS | {"num_local_experts": 4},
    "llama4_text": _EXPERTS | {"num_local_experts": 4, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1},
    "mixtral": _EXPERTS | {"num_local_experts": 4},
    "phimoe": _EXPERTS | {"num_local_experts": 4},
    "qwen2_moe": _EXPERTS | {
        "num_experts": 8, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1,
    },
}  # fmt: skip


def family_config(model_type: str, **sizes: Any) -> Any:
    """The configuration of a tiny model of this type."""
    return CONFIG_MAPPING[model_type](**_SIZES | FAMILIES[model_type] | sizes)


def build_family(path: Path, model_type: str) -> Path:
    """`path` as a Hugging Face directory of random weights, with the tokenizer of the tiny Llama."""
    build_tiny_model(path)
    (path / "model.safetensors").unlink()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(family_config(model_type)).to(torch.bfloat16)
    model.save_pretrained(path)
    return path
