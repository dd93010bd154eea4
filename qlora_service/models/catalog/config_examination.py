"""Examination of a config.json by transformers: run by `causality` in a child process, because it imports torch.

    python -m qlora_service.models.catalog.config_examination < config.json

prints the findings as a JSON list. Causality and positions are measured on a miniature of the model with random
weights.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

import structlog

from qlora_service.models.catalog.miniature import VOCABULARY, miniature
from qlora_service.process.startup import end_process, importing_torch

_PACKAGE = re.compile(r"requires the (\S+) library")
log = structlog.get_logger(__name__)

PROBE_TOKENS = 20
TOLERANCE = 1e-5
"""Share of the largest logit: equal kernels differ by 1e-7, and the smallest change in random weights was 4e-4."""


def examine(config: dict[str, Any]) -> list[str]:
    """Why the model of a decoded config.json cannot be trained as a causal language model; empty if it can."""
    with importing_torch():
        import transformers
        from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
    model_type = config["model_type"]
    known = model_type in CONFIG_MAPPING  # which has no `get`
    kind: Any = CONFIG_MAPPING[model_type] if known else None
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return [
            f"config.json has the model type {model_type}, which transformers {transformers.__version__} does not load "
            "as a causal language model: choose another model"
        ]
    try:
        parsed = kind.from_dict(config)
    except Exception as error:  # noqa: BLE001 - configs validate themselves in any way
        return [f"transformers {transformers.__version__} cannot read config.json: {error}"]
    architecture = config["architectures"][0]
    try:
        leak, shift = _changes(parsed)
    except ImportError as error:
        packages = sorted(set(_PACKAGE.findall(str(error)))) or [str(error).strip()]
        return [
            f"transformers loads {architecture} only with packages that are not installed here: {', '.join(packages)}; "
            "install them, or choose another model"
        ]
    if leak > TOLERANCE:
        remedy = "choose a decoder, such as Llama, Qwen or Gemma"
        if getattr(parsed, "is_decoder", None) is False:
            remedy += ", or set is_decoder to true in config.json if it was trained as a decoder"
        return [
            f"it is not causal: the predictions of {architecture} change with later tokens, so that it cannot learn to "
            f"continue a text: {remedy}"
        ]
    if shift > TOLERANCE:
        return [
            f"{architecture} does not count positions from 0, as rows are trained here: choose a decoder, such as "
            "Llama, Qwen or Gemma"
        ]
    return []


def _decode_float(value: dict[str, Any]) -> Any:
    """Infinity and NaN, which transformers writes as objects."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _changes(config: Any) -> tuple[float, float]:
    """Largest changes of a logit before the last token, over the largest logit: by another last token, and by
    positions that are given as 0, 1, ….

    0 for a model whose miniature cannot be built or run. Raises: ImportError, when it needs further packages.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    ids = torch.randint(3, VOCABULARY // 2, (1, PROBE_TOKENS))
    changed = ids.clone()
    changed[0, -1] += 1
    positions = torch.arange(PROBE_TOKENS)[None]
    inputs = ({"input_ids": ids}, {"input_ids": changed}, {"input_ids": ids, "position_ids": positions})
    try:
        small = type(config).from_dict(miniature(config.to_dict()))
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
        with torch.no_grad():
            logits, *others = (model(**given, use_cache=False).logits[0, :-1] for given in inputs)
        leak, shift = (float((logits - other).abs().max() / logits.abs().max()) for other in others)
        return leak, shift
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001 - the miniature of an unusual config may fail anywhere
        log.warning("miniature_failed", model_type=config.model_type, error=str(error))
        return 0.0, 0.0


def main() -> None:
    # The libraries read these when they are imported: no network, no progress bars, errors only.
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    print(json.dumps(examine(json.load(sys.stdin, object_hook=_decode_float))))


if __name__ == "__main__":
    main()
    end_process(0)
