"""One adapter for the embedding and the head that shares its weight, in training and in the published files."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel, get_peft_model

from qlora_service.models.adapters import attach_adapter, load_adapter, save_adapter, trainable_parameters
from qlora_service.models.base.quantize import load_base
from qlora_service.models.peft_config import peft_config
from qlora_service.specs import Lora, Quantization
from tests.tiny_training import CPU

ADAPTER = Lora(r=4, target_modules=["embed_tokens", "q_proj"])
IDS = torch.arange(3, 60).reshape(3, 19)


def load(directory: Path, dtype: torch.dtype = torch.bfloat16) -> PeftModel:
    return attach_adapter(load_base(directory, Quantization(), dtype, CPU), ADAPTER, seed=0)


def load_trained(directory: Path, dtype: torch.dtype) -> PeftModel:
    """The model after three steps of bitsandbytes' AdamW, which makes parameters contiguous."""
    model = load(directory, dtype)
    optimizer = bnb.optim.AdamW(trainable_parameters(model), lr=0.01)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS).logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_embedding_and_head_have_the_same_adapter_after_training(dtype: torch.dtype, tiny_model: Path) -> None:
    model = load_trained(tiny_model, dtype)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.get_delta_weight("default").any()
    assert torch.equal(embedding.get_delta_weight("default"), head.get_delta_weight("default"))
    assert not [name for name, _ in model.named_parameters() if "lm_head.lora" in name]


def test_gradient_is_the_sum_over_both_uses(tiny_model: Path) -> None:
    tied = load(tiny_model, torch.float32)
    base = load_base(tiny_model, Quantization(), torch.float32, CPU)
    torch.manual_seed(0)
    untied = get_peft_model(base, peft_config(ADAPTER, base))
    generator = torch.Generator().manual_seed(1)
    for parameter in tied.get_input_embeddings().lora_embedding_A.values():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    for name, value in tied.state_dict().items():
        untied.state_dict()[name].copy_(value)
    for model in (tied, untied):
        model(IDS, labels=IDS).loss.backward()
    embedding, head = untied.get_input_embeddings(), untied.get_output_embeddings()
    for matrix, head_matrix in (("A", head.lora_B), ("B", head.lora_A)):
        grad_tied = getattr(tied.get_input_embeddings(), f"lora_embedding_{matrix}")["default"].grad
        grad_embedding = getattr(embedding, f"lora_embedding_{matrix}")["default"].grad
        grad_head = head_matrix["default"].weight.grad
        assert grad_embedding.any()
        assert grad_head.any()
        assert torch.allclose(grad_tied, grad_embedding + grad_head.t(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_published_files_give_the_same_logits_with_peft_alone(
    dtype: torch.dtype, tiny_model: Path, tmp_path: Path
) -> None:
    model = load_trained(tiny_model, dtype)
    save_adapter(model, tmp_path, "tiny", None)
    expected = logits(model)
    base = load_base(tiny_model, Quantization(), dtype, CPU)
    assert torch.equal(logits(load_adapter(base, tmp_path)), expected)
    # PEFT's own layout of the same matrices sums in another order.
    plain_peft = PeftModel.from_pretrained(load_base(tiny_model, Quantization(), dtype, CPU), str(tmp_path))
    assert torch.allclose(logits(plain_peft), expected, atol=0.05 if dtype is torch.bfloat16 else 1e-5)
