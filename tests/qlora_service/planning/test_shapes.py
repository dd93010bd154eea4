"""Shapes equal those of the models that transformers builds from the same config.json."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from qlora_service.errors import InvalidModel
from qlora_service.planning.shapes import ModelShape
from qlora_service.specs import JobSpec
from tests.planning_models import MODELS, config


@pytest.mark.parametrize("name", MODELS)
def test_matrices_and_parameters_equal_those_of_the_model(name: str) -> None:
    values = MODELS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[values["model_type"]].from_dict(dict(values)))
    shape = ModelShape.from_config(values)
    layer = model.get_decoder().layers[0]
    linear = {path.rpartition(".")[2]: m for path, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
    assert shape.matrices == {name: tuple(module.weight.shape) for name, module in linear.items()}
    assert shape.attention_bias == (linear["q_proj"].bias is not None)
    assert shape.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=1e-4)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}, (768, 12, 3072, 1024)),
        ({"text_config": config(64, 128, 2, 4, 2, 512), "vision_config": {}}, (64, 2, 128, 131072)),
    ],
)
def test_alternative_names_and_nested_sizes_are_read(values: dict[str, Any], expected: tuple[int, ...]) -> None:
    shape = ModelShape.from_config(values)
    assert (shape.hidden, shape.layers, shape.intermediate, shape.max_positions) == expected


def test_a_missing_size_is_named() -> None:
    with pytest.raises(InvalidModel, match=r"config\.json has no vocab_size: memory cannot be planned without it"):
        ModelShape.from_config({"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4})


def test_longest_row_is_limited_by_the_model() -> None:
    job = JobSpec.model_validate({"base_model": "m", "training": {"max_seq_len_tokens": 4096}})
    assert ModelShape.from_config(config(64, 128, 2, 4, 2, 512, max_position_embeddings=512)).longest_tokens(job) == 512
    assert ModelShape.from_config(config(64, 128, 2, 4, 2, 512)).longest_tokens(job) == 4096
