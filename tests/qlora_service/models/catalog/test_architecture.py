"""Findings and sizes of the config.json of every class in transformers' causal-LM mapping."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qlora_service.models.catalog.architecture import (
    ROUTINE_TYPES,
    UNLIMITED_POSITIONS,
    UNLIMITED_TYPES,
    architecture_findings,
    model_sizes,
)

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
SIZES = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256}
COMPOSITE = {"musicgen", "musicgen_melody"}
"""Audio models, whose decoder transformers does not build from their config"""
DECODER_LAYERS = {
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
    "whisper",
}  # fmt: skip
"""Decoders out of encoder-decoders; transformers' `num_hidden_layers` counts their encoder's layers"""
HALVED = {"longcat_flash"}
"""transformers' `num_hidden_layers` counts two sublayers for each layer"""


@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - COMPOSITE))
def test_sizes_are_those_that_transformers_reads(model_type: str) -> None:
    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception:
        pytest.skip("transformers' own default of this config is invalid")
    if architecture_findings({"model_type": model_type, "architectures": ["XForCausalLM"]}):
        return
    findings: list[str] = []
    sizes = model_sizes({"model_type": model_type, **config.to_dict()}, findings)
    text = config.get_text_config()
    assert not findings
    assert (sizes["vocab_size"], sizes["hidden_size"]) == (text.vocab_size, text.hidden_size)
    if model_type not in DECODER_LAYERS | HALVED:
        assert sizes["num_layers"] == text.num_hidden_layers
    limit = getattr(text, "max_position_embeddings", None)
    if model_type in UNLIMITED_TYPES:
        assert limit in {None, -1}
        assert sizes["max_positions"] == UNLIMITED_POSITIONS
    elif limit is not None and limit > 0:
        assert sizes["max_positions"] == limit


def test_routine_types_are_in_the_mapping() -> None:
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() >= ROUTINE_TYPES


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("mamba", "a Mamba model"), ("falcon_mamba", "a Mamba model"), ("rwkv", "an RWKV model"),
        ("xlstm", "an xLSTM model"), ("blt", "a Byte Latent Transformer"), ("gemma4_assistant", "a drafter"),
    ],
)  # fmt: skip
def test_unsupported_family_is_named(model_type: str, words: str) -> None:
    (finding,) = architecture_findings({"model_type": model_type, "architectures": ["XForCausalLM"]})
    assert finding.startswith(f"it is {words}")
    assert "choose a decoder with attention" in finding


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"is_encoder_decoder": True}, "config.json has the architecture LlamaForCausalLM, an encoder and a decoder"),
        ({"architectures": ["LlamaModel"]}, "config.json has the architecture LlamaModel, which is no causal"),
        ({"architectures": []}, "config.json has no architectures"),
        ({"model_type": 3}, "config.json has no model_type"),
    ],
)
def test_config_of_another_kind_of_model_is_refused(changes: dict[str, Any], finding: str) -> None:
    assert not architecture_findings(LLAMA)
    (found,) = architecture_findings(LLAMA | changes)
    assert found.startswith(finding)


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"max_position_embeddings": None}, "config.json has no max_position_embeddings: add the longest sequence"),
        ({"hidden_size": None}, "config.json has no hidden_size: add the width"),
        ({"num_hidden_layers": 0}, "config.json has no num_hidden_layers that is a positive integer"),
        ({"vocab_size": "512"}, "config.json has no vocab_size that is a positive integer"),
    ],
)
def test_missing_size_is_named_with_its_meaning(changes: dict[str, Any], finding: str) -> None:
    findings: list[str] = []
    model_sizes(LLAMA | SIZES | changes, findings)
    assert len(findings) == 1
    assert findings[0].startswith(finding)


@pytest.mark.parametrize(
    ("config", "field", "size"),
    [
        ({"n_positions": 128}, "max_positions", 128),
        ({"model_max_length": 128}, "max_positions", 128),
        ({"max_target_positions": 128}, "max_positions", 128),
        ({"max_position_embeddings": 64, "n_positions": 128}, "max_positions", 64),
        ({"decoder_layers": 7}, "num_layers", 7),
        ({"layers_block_type": ["moe"] * 5}, "num_layers", 5),
        ({"text_config": {"hidden_size": 96}, "hidden_size": 64}, "hidden_size", 96),
    ],
)
def test_size_has_other_names_in_other_families(config: dict[str, Any], field: str, size: int) -> None:
    assert model_sizes(config, [])[field] == size
