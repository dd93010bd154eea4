"""What only a CUDA device can show. Expected figures stand in the tests; without a device they are skipped by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_service.models.adapters import attach, trainable
from qlora_service.models.nf4 import base_fingerprint, load_base
from qlora_service.specs import Lora, Quantization, Training
from qlora_service.training.attention import isolate_documents
from qlora_service.training.device import choose_device, has_bf16, peak_memory_bytes
from qlora_service.training.evaluation import mean_loss
from qlora_service.training.micro_batch import collate, forward, loss_sum
from qlora_service.training.optimizer import make_optimizer
from tests.tiny_training import gradients, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def device() -> torch.device:
    return choose_device()


def test_bf16_is_claimed_from_ampere_on(device: torch.device) -> None:
    assert has_bf16(device) is (torch.cuda.get_device_capability(device)[0] >= 8)


def test_nf4_weights_take_4_127_bits_each(device: torch.device) -> None:
    """QLoRA, section 3: 4 bits, one 8-bit constant per 64 weights, one float32 per 256 constants."""
    weights, layers = 4096, 4
    linear = torch.nn.Sequential(*(torch.nn.Linear(weights, weights, bias=False) for _ in range(layers)))
    import bitsandbytes as bnb

    quantized = torch.nn.Sequential(
        *(
            bnb.nn.Linear4bit(weights, weights, bias=False, quant_type="nf4", compress_statistics=True)
            for _ in range(layers)
        )
    )
    quantized.load_state_dict(linear.state_dict())
    del linear
    before = torch.cuda.memory_allocated(device)
    quantized.to(device)
    bits = 8 * (torch.cuda.memory_allocated(device) - before) / (layers * weights * weights)
    assert bits == pytest.approx(4.127, abs=0.02)


def test_packed_documents_are_isolated(tiny_model: Path, device: torch.device) -> None:
    base = load_base(tiny_model, Quantization(), torch.float32, device)
    assert isolate_documents(base) == "per_document"
    documents = rows(5)
    with torch.no_grad():
        packed = forward(base, collate(documents, device))
        alone = torch.cat([forward(base, collate([document], device)) for document in documents])
    assert (packed - alone).abs().max() < 1e-4


def test_gradients_are_those_of_the_cpu(tiny_model: Path, device: torch.device) -> None:
    """float32 on both sides: within 1e-3 of each tensor's largest."""
    found = []
    for place in (torch.device("cpu"), device):
        model = attach(load_base(tiny_model, Quantization(), torch.float32, place), Lora(r=4), seed=0).train()
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        loss_sum(model, collate(rows(4), place)).backward()
        found.append({name: gradient.cpu() for name, gradient in gradients(model).items()})
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).abs().max() <= 1e-3 * gradient.abs().max(), name


def test_gradients_are_the_same_after_an_evaluation(tiny_model: Path, device: torch.device) -> None:
    model = attach(load_base(tiny_model, Quantization(), torch.float32, device), Lora(r=4), seed=0).train()
    batch = collate(rows(4), device)
    loss_sum(model, batch).backward()
    before = gradients(model)
    model.zero_grad()
    mean_loss(model, rows(3), device)
    loss_sum(model, batch).backward()
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, before[name], rtol=1e-4, atol=1e-7), name


def test_only_states_of_100_000_elements_page(device: torch.device) -> None:
    """bitsandbytes, optim/optimizer.py: a LoRA of rank 16 on a side of 4,096 (65,536 elements) never pages."""
    large = torch.nn.Parameter(torch.zeros(400, 400, device=device))
    small = torch.nn.Parameter(torch.zeros(16, 4096, device=device))
    optimizer = make_optimizer([large, small], Training(), device)
    for parameter in (large, small):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert getattr(optimizer.state[large]["state1"], "is_paged", False) is True
    assert getattr(optimizer.state[small]["state1"], "is_paged", False) is False


def test_the_fingerprint_is_reproducible(tiny_model: Path, device: torch.device) -> None:
    base = load_base(tiny_model, Quantization(), torch.float32, device)
    before = base_fingerprint(base)
    model = attach(base, Lora(r=4), seed=0)
    assert len(trainable(model)) == 28
    assert base_fingerprint(model.unload()) == before
    assert peak_memory_bytes(device) > 0
