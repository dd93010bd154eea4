"""The frozen base on the device: its linear layers in NF4 or FP4 (QLoRA, arXiv:2305.14314), in int8, or as they are.

bitsandbytes has the kernels. What it would get quietly wrong while training is set right here.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_service.errors import InvalidModel
from qlora_service.process.startup import gc_disabled
from qlora_service.specs import Quantization

# Any few token ids will do: the same ones at load and at the certificate.
FINGERPRINT_TOKENS = 32
# bitsandbytes' code for the largest int8 weight of a row.
INT8_MAX = 127.0


def load_base(
    model_dir: Path, quantization: Quantization, compute_dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The base model, frozen, on `device`; every linear layer but the output head quantized as asked.

    Raises:
        InvalidModel: transformers cannot load the directory.
    """
    config = bitsandbytes_config(quantization, compute_dtype)
    return _load(model_dir, compute_dtype, device, {} if config is None else {"quantization_config": config})


def load_quantized(directory: Path, compute_dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The base that was saved after `load_base` had quantized it for this dtype and kind of device: the same bits.

    Raises:
        InvalidModel: transformers cannot load the directory.
    """
    # Its own config says how it is quantized; a second opinion, even None, would be taken instead.
    # Weights stay in their files; a third of the time went into looking for garbage among what describes them.
    with gc_disabled():
        return _load(directory, compute_dtype, device, {})


def _load(
    model_dir: Path, compute_dtype: torch.dtype, device: torch.device, options: dict[str, Any]
) -> PreTrainedModel:
    try:
        model: PreTrainedModel
        model, loaded = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=compute_dtype,
            device_map={"": device},
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError) as error:
        raise InvalidModel(f"the base model at {model_dir.name} cannot be loaded: {error}") from error
    if missing := sorted(loaded["missing_keys"]):
        # transformers would go on with random weights in their place.
        raise InvalidModel(
            f"the base model at {model_dir.name} lacks {len(missing)} weights, such as {missing[0]}: import it whole"
        )
    model.requires_grad_(False)
    model.config.use_cache = False
    guard_linear4bit(model, compute_dtype)
    guard_linear8bit(model)
    return model


def bitsandbytes_config(quantization: Quantization, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if quantization.type == "none":
        return None
    if quantization.type == "int8":
        # Above 0, activations over the threshold anywhere in the batch send their whole column through 16 bits:
        # a row's logits would depend on its neighbours (by 0.012 with the default of 6.0).
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def guard_linear4bit(model: torch.nn.Module, compute_dtype: torch.dtype) -> None:
    """Make every `Linear4bit` compute true gradients after an evaluation.

    On CPUs with AVX512-BF16, a forward without gradients in eval mode repacks the weights in place; gradients
    after that are wrong while the loss looks normal. And the backward dequantizes to `quant_state.dtype`,
    the forward to the input's: they must agree (bitsandbytes 0.50.2, nn/modules.py and autograd/_functions.py).
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.weight.quant_state.dtype = compute_dtype


class _OneArithmetic(bnb.MatmulLtState):
    """Int8 state whose CPU product is that of dequantized weights in evaluation too, not in training only."""

    is_training = property(lambda _: True, lambda _, __: None)


def guard_linear8bit(model: torch.nn.Module) -> None:
    """Make every `Linear8bitLt` compute the same in training and in evaluation.

    On a CPU bitsandbytes multiplies by dequantized weights while training but quantizes the activations too in eval
    mode: the held-out loss would be that of another model (autograd/_functions.py, `matmul`). On CUDA both quantize
    each row of activations by itself, and say at every call that they cast it to float16.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            module.state.__class__ = _OneArithmetic
            logging.getLogger(bnb.matmul.__module__).setLevel(logging.ERROR)


@torch.no_grad()
def dequantized_weight(module: Any) -> torch.Tensor:
    """The float32 weight (out, in) that a linear layer, quantized or not, multiplies by."""
    weight: Any = module.weight
    if isinstance(module, bnb.nn.Linear4bit):
        unpacked: torch.Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        return unpacked.float()
    if isinstance(module, bnb.nn.Linear8bitLt):
        scales = weight.SCB if weight.SCB is not None else module.state.SCB  # moved there by the first forward pass
        weight = weight.data * (scales / INT8_MAX)[:, None]
    floats: torch.Tensor = weight.data.float()
    return floats.T if isinstance(module, Conv1D) else floats


@torch.no_grad()
def base_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of the base's logits on fixed tokens, bit for bit: another value means that the base has changed."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(1, FINGERPRINT_TOKENS + 1, device=device) % vocabulary)[None]  # (1, tokens)
    logits = model(input_ids=ids, use_cache=False).logits
    model.train(was_training)
    return hashlib.sha256(logits.float().cpu().numpy().tobytes()).hexdigest()
