"""Whether transformers loads a config as a causal language model that is causal in fact, examined in a child process.

BERT and its descendants stand in transformers' causal-LM mapping, and whether they are causal depends on their config.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import structlog

from qlora_service.models.catalog.architecture import ROUTINE_TYPES

log = structlog.get_logger(__name__)

LIMIT_S = 120.0


def causality_findings(config_json: bytes) -> list[str]:
    """Why the config's model cannot be trained as a causal language model; empty if it can, or if nobody can tell.

    Takes 5 s for a type outside `ROUTINE_TYPES`.
    """
    config = json.loads(config_json)
    if config["model_type"] in ROUTINE_TYPES and not _has_bidirectional_switch(config):
        return []
    return list(_examined_in_child(config_json))


@lru_cache(maxsize=8)
def _examined_in_child(config_json: bytes) -> tuple[str, ...]:
    """Cached, because the settings of a model on the hub are checked before its weights are fetched, and after."""
    try:
        result = subprocess.run(
            [sys.executable, "-m", "qlora_service.models.catalog.config_examination"],
            input=config_json,
            capture_output=True,
            timeout=LIMIT_S,
            check=True,
        )
        return tuple(json.loads(result.stdout))
    except (subprocess.SubprocessError, ValueError) as error:
        stderr = getattr(error, "stderr", None) or b""
        log.warning("causality_not_examined", error=str(error), stderr=stderr.decode(errors="replace")[-500:])
        return ()


def _has_bidirectional_switch(config: Mapping[str, Any]) -> bool:
    nested = config.get("text_config")
    keys = [*config.items(), *(nested.items() if isinstance(nested, Mapping) else ())]
    return any("bidirectional" in key or key == "is_causal" for key, value in keys if value is not None)
