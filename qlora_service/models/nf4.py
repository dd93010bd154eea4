"""The frozen base in 4 bits: NF4 with double quantization (QLoRA, arXiv:2305.14314), by bitsandbytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import bitsandbytes as bnb
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from qlora_service.errors import InvalidModel
from qlora_service.specs import Quantization

# Any few token ids will do: the same ones at load and at the certificate.
FINGERPRINT_TOKENS = 32


def load_base(
    model_dir: Path, quantization: Quantization, compute_dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The base model, frozen, on `device`; every linear layer but the output head in 4 bits.

    Raises:
        InvalidModel: transformers cannot load the directory.
    """
    config = None
    if quantization.type == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=quantization.double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    try:
        model: PreTrainedModel
        model, loaded = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=compute_dtype,
            quantization_config=config,
            device_map={"": device},
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
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
    return model


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
