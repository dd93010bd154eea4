"""A base model from its config.json alone: what `models.nf4.load_base` would load, with shapes in place of values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from qlora_service.models.nf4 import bitsandbytes_config, guard_linear4bit, guard_linear8bit
from qlora_service.specs import Quantization

BLOCK, CONSTANTS_BLOCK = 64, 256
"""Weights for each constant, and constants for each of theirs: bitsandbytes 0.50, functional.py"""
CODES, CONSTANT_CODES = 16, 256
META = torch.device("meta")


def simulated_base(
    config: Mapping[str, Any], quantization: Quantization, compute_dtype: torch.dtype
) -> PreTrainedModel:
    """The frozen model on device "meta", its linear layers quantized as asked.

    Raises:
        ValueError, KeyError, …: transformers does not know the architecture, or cannot build it from this.
    """
    fields = {name: value for name, value in config.items() if name not in {"model_type", "quantization_config"}}
    kind = CONFIG_MAPPING[config["model_type"]]
    with META:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            kind(**fields), dtype=compute_dtype, trust_remote_code=False
        )
        if (settings := bitsandbytes_config(quantization, compute_dtype)) is not None:
            quantizer = AutoHfQuantizer.from_config(settings)
            quantizer.preprocess_model(model=model, device_map={"": META})
            for module in model.modules():
                if isinstance(module, bnb.nn.Linear4bit):
                    _pack_4bit(module, quantization)
                elif isinstance(module, bnb.nn.Linear8bitLt):
                    _pack_8bit(module)
            quantizer.postprocess_model(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    guard_linear4bit(model, compute_dtype)
    guard_linear8bit(model)
    return model


def _pack_4bit(module: Any, quantization: Quantization) -> None:
    """Give the layer what quantizing would have given it: `Params4bit` itself would want values."""
    shape = torch.Size((module.out_features, module.in_features))
    blocks = -(-shape.numel() // BLOCK)
    state = QuantState(
        absmax=torch.empty(blocks),
        shape=shape,
        code=torch.empty(CODES),
        blocksize=BLOCK,
        quant_type=quantization.type,
        dtype=module.compute_dtype,
    )
    if quantization.double_quant:
        state.absmax = torch.empty(blocks, dtype=torch.uint8)
        state.offset, state.nested = torch.empty(()), True
        state.state2 = QuantState(
            absmax=torch.empty(-(-blocks // CONSTANTS_BLOCK)),
            code=torch.empty(CONSTANT_CODES),
            blocksize=CONSTANTS_BLOCK,
            dtype=torch.float32,
        )
    packed: Any = torch.nn.Parameter(
        torch.empty(-(-shape.numel() // 2), 1, dtype=torch.uint8), requires_grad=False
    )
    packed.quant_state, packed.compress_statistics = state, quantization.double_quant
    packed.quant_type, packed.blocksize, packed.bnb_quantized = quantization.type, BLOCK, True
    module._parameters["weight"], module.quant_state = packed, state


def _pack_8bit(module: Any) -> None:
    packed: Any = torch.nn.Parameter(
        torch.empty(module.out_features, module.in_features, dtype=torch.int8), requires_grad=False
    )
    packed.CB, packed.SCB, packed.has_fp16_weights = packed.data, torch.empty(module.out_features), False
    module._parameters["weight"] = packed
