"""A base model from its config.json alone: the result of `models.base.quantize.load_base` on meta tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from bitsandbytes.functional import QuantState
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from qlora_service.models.base.quantize import bitsandbytes_config, guard_linear4bit, guard_linear8bit
from qlora_service.specs import Quantization

BLOCK, CONSTANTS_BLOCK = 64, 256
"""Weights per constant, and constants per nested constant (bitsandbytes 0.50, functional.py)"""
CODES, CONSTANT_CODES = 16, 256
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
META = torch.device("meta")


def simulated_base(
    config: Mapping[str, Any], quantization: Quantization, compute_dtype: torch.dtype
) -> PreTrainedModel:
    """The frozen model on device "meta", with quantized linear layers.

    Raises:
        ValueError: transformers does not know the architecture. Errors of transformers about an inconsistent config
            pass unchanged.
    """
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"transformers {transformers.__version__} does not know the architecture {model_type!r}")
    config_class = CONFIG_MAPPING[model_type]
    # A config.json has infinity as {"__float__": "Infinity"}.
    values = config_class._decode_special_floats(dict(config))
    with META:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config_class.from_dict(values), dtype=compute_dtype, trust_remote_code=False
        )
        if (
            quantization_config := bitsandbytes_config(quantization, compute_dtype, model.config.model_type)
        ) is not None:
            quantizer = AutoHfQuantizer.from_config(quantization_config)
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


def with_first_layers(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The config of the model with only its first `layers`."""
    short = dict(config)
    if isinstance(short.get("text_config"), Mapping):
        short["text_config"] = with_first_layers(short["text_config"], layers)
    name = next((name for name in LAYER_COUNTS if name in short), None)
    if name is None or short[name] <= layers:
        return short
    all_layers, short[name] = short[name], layers
    return {
        key: value[:layers] if isinstance(value, list) and len(value) == all_layers else value
        for key, value in short.items()
    }


def _pack_4bit(module: Any, quantization: Quantization) -> None:
    """Gives the layer the packed weight and constants that quantization would have produced."""
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
    packed = bnb.nn.Params4bit(
        torch.empty(-(-shape.numel() // 2), 1, dtype=torch.uint8),
        quant_state=state,
        compress_statistics=quantization.double_quant,
        quant_type=quantization.type,
        bnb_quantized=True,
        module=module,
    )
    module._parameters["weight"], module.quant_state = packed, state


def _pack_8bit(module: Any) -> None:
    codes = torch.empty(module.out_features, module.in_features, dtype=torch.int8)
    scales = torch.empty(module.out_features)
    module._parameters["weight"] = bnb.nn.Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)
