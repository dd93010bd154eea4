"""Reduced configs."""

from __future__ import annotations

from qlora_service.models.catalog.miniature import LAYERS, miniature


def test_sizes_shrink_and_switches_stay() -> None:
    config = {"hidden_size": 4096, "vocab_size": 32000, "is_decoder": True, "rope_parameters": {"rope_theta": 1e6}}
    assert miniature(config) == config | {"hidden_size": 64, "vocab_size": 512}


def test_sizes_that_are_small_enough_stay() -> None:
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    assert miniature(config) == config


def test_layers_of_every_kind_stay() -> None:
    kinds = ["linear"] * 7 + ["full"]
    small = miniature({"num_hidden_layers": 8, "layer_types": kinds, "intermediate_size": [512] * 8})
    assert small["num_hidden_layers"] == LAYERS
    assert small["layer_types"] == ["linear"] * (LAYERS - 1) + ["full"]
    assert small["intermediate_size"] == [128] * LAYERS


def test_heads_with_keys_of_their_own_keep_them() -> None:
    assert miniature({"num_attention_heads": 32, "num_key_value_heads": 32})["num_key_value_heads"] == 4
    assert miniature({"num_attention_heads": 32, "num_key_value_heads": 8})["num_key_value_heads"] == 2


def test_nested_configs_and_single_layers_shrink() -> None:
    config = {
        "image_token_id": 248056,
        "text_config": {
            "num_hidden_layers": 6,
            "layer_types": ["sliding"] * 5 + ["full"],
            "per_layer_config": {"5": {"head_dim": 512}},
        },
    }
    text = miniature(config)["text_config"]
    assert miniature(config)["image_token_id"] < 512
    assert text["layer_types"] == ["sliding"] * 3 + ["full"]
    assert text["per_layer_config"] == {"3": {"head_dim": 16}}
