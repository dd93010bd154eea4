"""What config.json says about the architecture: whether it can be trained here, and its sizes. Pure JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Endings of the classes' names in transformers' causal-LM mapping.
_CAUSAL_LM = ("ForCausalLM", "LMHeadModel", "GenerationDecoder", "ForConditionalGeneration")

_STATE_SPACE = "has layers with a recurrent state and no attention"
_UNSUPPORTED = {
    "mamba": f"a Mamba model, which {_STATE_SPACE}",
    "mamba2": f"a Mamba model, which {_STATE_SPACE}",
    "falcon_mamba": f"a Mamba model, which {_STATE_SPACE}",
    "rwkv": f"an RWKV model, which {_STATE_SPACE}",
    "xlstm": f"an xLSTM model, which {_STATE_SPACE}",
    "gemma4_assistant": "a drafter for speculative decoding, which runs only beside another Gemma 4 model",
    "gemma4_unified_assistant": "a drafter for speculative decoding, which runs only beside another Gemma 4 model",
    "reformer": "a Reformer, whose attention is hashed at random and whose layers have a backward pass of their own",
    "blt": "a Byte Latent Transformer, which reads patches of bytes instead of tokens",
}

# The names in config.json by field of `ModelFacts`: transformers', then those of other families.
_SIZE_NAMES = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "n_embed", "emb_dim"),
    "num_layers": (
        "num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "num_decoder_layers",
    ),
    "max_positions": (
        "max_position_embeddings", "n_positions", "max_seq_len", "model_max_length", "max_target_positions",
    ),
}  # fmt: skip
_LAYER_LIST = "layers_block_type"
"""Nemotron-H's list of layers, whose length is their number"""
_MEANINGS = {
    "vocab_size": "the number of rows of the embedding",
    "hidden_size": "the width of the embedding",
    "num_layers": "the number of decoder layers",
    "max_positions": "the longest sequence in tokens that the model was trained on, which its model card names",
}

UNLIMITED_TYPES = {"bloom", "cpmant", "recurrent_gemma", "xlnet"}
"""Model types without a longest sequence, in config.json and in fact: ALiBi, relative positions, or a window and a
state."""
UNLIMITED_POSITIONS = 1 << 20
"""Their `max_positions`: the largest max_seq_len_tokens of a job."""

ROUTINE_TYPES = {
    "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
    "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "llama",
    "mistral", "mixtral", "mpt", "nemotron", "olmo", "olmo2", "olmoe", "opt", "phi", "phi3", "phimoe", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "smollm3", "stablelm", "starcoder2",
}  # fmt: skip
"""Frequent types whose structure is known: causal with any config that has no switch for bidirectional attention, and a
loss reaches all of their linear layers. Others are examined."""


def architecture_findings(config: Mapping[str, Any]) -> list[str]:
    """Why no model of this config can be trained here, whatever its sizes; empty if one may be."""
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if not isinstance(model_type, str):
        return ["config.json has no model_type"]
    if not (isinstance(architectures, list) and architectures and isinstance(architectures[0], str)):
        return ["config.json has no architectures"]
    if model_type in _UNSUPPORTED:
        return [
            f"it is {_UNSUPPORTED[model_type]}: such models are not supported, choose a decoder with attention, such "
            "as Llama, Qwen or Gemma"
        ]
    if config.get("is_encoder_decoder"):
        return [
            f"config.json has the architecture {architectures[0]}, an encoder and a decoder, which is no causal "
            "language model: choose a model that is a decoder alone"
        ]
    if not architectures[0].endswith(_CAUSAL_LM):
        return [f"config.json has the architecture {architectures[0]}, which is no causal language model"]
    return []


def model_sizes(config: Mapping[str, Any], findings: list[str]) -> dict[str, int]:
    """The sizes by field of `ModelFacts`; adds what is missing to `findings`."""
    # Models that also read images have the language model's sizes in `text_config`.
    text_config = config.get("text_config")
    values = {**config, **text_config} if isinstance(text_config, Mapping) else config
    if isinstance(layers := values.get(_LAYER_LIST), list):
        values = {"num_hidden_layers": len(layers), **values}
    sizes = {}
    for field, names in _SIZE_NAMES.items():
        name, value = next(((name, values[name]) for name in names if values.get(name) is not None), (names[0], None))
        if value is None and field == "max_positions" and config.get("model_type") in UNLIMITED_TYPES:
            value = UNLIMITED_POSITIONS
        if type(value) is int and value > 0:
            sizes[field] = value
        elif value is None:
            findings.append(f"config.json has no {name}: add {_MEANINGS[field]}")
        else:
            findings.append(f"config.json has no {name} that is a positive integer: set it to {_MEANINGS[field]}")
    return sizes
