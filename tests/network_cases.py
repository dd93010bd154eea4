"""Cases shared by the tests of `training/network`: small configs, both paths, a recurrent architecture."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CONFIG_MAPPING, PretrainedConfig

from tests.judges import SMALL

BOTH_PATHS = pytest.mark.parametrize("fast", [True, False], ids=["llama", "general"])
MAMBA = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "use_mambapy": False}


def config_of(kind: str, **fields: Any) -> PretrainedConfig:
    """The small config of an architecture, with these fields changed."""
    config: PretrainedConfig = CONFIG_MAPPING[kind](**(SMALL | fields))
    return config
