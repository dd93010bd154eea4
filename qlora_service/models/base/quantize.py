"""The frozen base on the device: linear layers in NF4 or FP4 (QLoRA, arXiv:2305.14314), in int8, or unquantized.

bitsandbytes has the kernels. The guards here correct settings with which it would silently train wrongly.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_service.errors import InvalidModel
from qlora_service.process.startup import gc_disabled
from qlora_service.specs import Quantization

FINGERPRINT_TOKENS = 32
"""Number of token ids of the fingerprint. Any ids will do, if they are the same at loading and at certification."""
WEIGHTS_READ_DIRECTLY = {
    "gemma3n": ("prediction_coefs", "correction_coefs"),
    "gemma3n_text": ("prediction_coefs", "correction_coefs"),
    "longcat_flash": ("classifier",),
}
"""Linear layers by model type whose weight the architecture reads itself: they stay unquantized (transformers 5.23)"""
INT8_MAX = 127.0
"""bitsandbytes' code for the largest int8 weight of a row."""


def load_base(
    model_dir: Path, quantization: Quantization, compute_dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The base model, frozen, on `device`; every linear layer has the given quantization, except the output head
    and `WEIGHTS_READ_DIRECTLY`.

    Raises:
        InvalidModel: transformers cannot load the directory.
    """
    config = bitsandbytes_config(quantization, compute_dtype, _model_type(model_dir))
    return _load(model_dir, compute_dtype, device, {} if config is None else {"quantization_config": config})


def load_quantized(directory: Path, compute_dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A saved result of `load_base` for the same dtype and kind of device, quantized: bit for bit the same.

    Raises:
        InvalidModel: transformers cannot load the directory.
    """
    # No quantization_config: it is in the directory's config.json, and an argument, even None, would override that.
    # Without GC: the weights stay in their files, and GC of the objects that describe them took a third of the time.
    with gc_disabled():
        return _load(directory, compute_dtype, device, {})


def bitsandbytes_config(
    quantization: Quantization, compute_dtype: torch.dtype, model_type: str | None
) -> BitsAndBytesConfig | None:
    """transformers' configuration of the quantization for models of this type; None for no quantization."""
    read_directly = WEIGHTS_READ_DIRECTLY.get(model_type or "")
    # A list replaces transformers' own, which has the output head.
    unquantized = None if read_directly is None else ["lm_head", *read_directly]
    if quantization.type == "none":
        return None
    if quantization.type == "int8":
        # With a threshold above 0, one larger activation anywhere in the batch moves its whole column to 16 bits:
        # a row's logits would depend on its neighbors (by 0.012 with the default of 6.0).
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=unquantized)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=unquantized,
    )


def guard_linear4bit(model: torch.nn.Module, compute_dtype: torch.dtype) -> None:
    """Makes every `Linear4bit` compute correct gradients after an evaluation.

    On CPUs with AVX512-BF16, a forward without gradients in eval mode repacks the weights in place; gradients
    after that are wrong while the loss looks normal. And the backward dequantizes to `quant_state.dtype`, the
    forward to the input's dtype: the two must agree (bitsandbytes 0.50.2, nn/modules.py and autograd/_functions.py).
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.weight.quant_state.dtype = compute_dtype


def guard_linear8bit(model: torch.nn.Module) -> None:
    """Makes every `Linear8bitLt` compute the same in training and in evaluation.

    On a CPU, bitsandbytes multiplies by dequantized weights in training, but quantizes the activations too in eval
    mode: the held-out loss would be that of another model (autograd/_functions.py, `matmul`). On CUDA both modes
    quantize each row of activations by itself, and log at every call that they cast it to float16.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            module.state.__class__ = _DequantizedMatmulState
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


def _model_type(model_dir: Path) -> str | None:
    """The type in config.json; None without this file, which `_load` reports."""
    path = model_dir / "config.json"
    return json.loads(path.read_bytes()).get("model_type") if path.is_file() else None


class _DequantizedMatmulState(bnb.MatmulLtState):
    """Int8 state with which a CPU multiplies by dequantized weights in evaluation too, not in training only."""

    is_training = property(lambda _: True, lambda _, __: None)


def _load(
    model_dir: Path, compute_dtype: torch.dtype, device: torch.device, options: dict[str, Any]
) -> PreTrainedModel:
    try:
        model: PreTrainedModel
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=compute_dtype,
            device_map={"": device},
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise InvalidModel(f"the base model at {model_dir.name} cannot be loaded: {error}") from error
    if missing := sorted(loading_info["missing_keys"]):
        # transformers would continue with random weights in their place.
        raise InvalidModel(
            f"the base model at {model_dir.name} lacks {len(missing)} weights, such as {missing[0]}: "
            "import the complete model"
        )
    model.requires_grad_(False)
    model.config.use_cache = False
    guard_linear4bit(model, compute_dtype)
    guard_linear8bit(model)
    return model
