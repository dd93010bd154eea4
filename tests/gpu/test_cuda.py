"""Properties that need a CUDA device. Expected figures are in the tests, which are skipped by name without one."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F

from qlora_service.models.adapters import attach_adapter, trainable_parameters
from qlora_service.models.base.quantize import base_fingerprint, load_base
from qlora_service.specs import Lora, Quantization
from qlora_service.training.device import choose_device, has_bf16, has_flash_attention, peak_memory_bytes
from qlora_service.training.network.cross_entropy import fused_losses
from qlora_service.training.network.isolation import isolate_documents
from qlora_service.training.network.micro_batch import collate, forward
from qlora_service.training.network.network import Network
from qlora_service.training.network.varlen_attention import AttentionShape, document_attention
from qlora_service.training.sizes import HEAD_CHUNK
from tests.tiny_training import gradients, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CPU = torch.device("cpu")


@pytest.fixture
def device() -> torch.device:
    return choose_device()


def make_network(
    tiny_model: Path, device: torch.device, dtype: torch.dtype = torch.float32, fast: bool = True
) -> Network:
    """The tiny model on NF4, with a B that is not zero, in training mode; the same weights on every device."""
    base = load_base(tiny_model, Quantization(), dtype, device)
    isolation = isolate_documents(base)
    model = attach_adapter(base, Lora(r=4), seed=0).train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return Network(model, isolation, fast=fast)


def step(network: Network) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and gradients of four rows, on the CPU."""
    losses = network.losses(rows(4)).nll
    losses.sum().backward()
    return losses.detach().cpu(), {name: gradient.cpu() for name, gradient in gradients(network.model).items()}


def test_bf16_is_reported_from_ampere_on(device: torch.device) -> None:
    assert has_bf16(device) is (torch.cuda.get_device_capability(device)[0] >= 8)


def test_nf4_weights_take_4_127_bits_each(device: torch.device) -> None:
    """QLoRA, section 3: 4 bits, one 8-bit constant per 64 weights, one float32 per 256 constants."""
    weights, layers = 4096, 4
    linear = torch.nn.Sequential(*(torch.nn.Linear(weights, weights, bias=False) for _ in range(layers)))
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
        separate = torch.cat([forward(base, collate([document], device)) for document in documents])
    assert (packed - separate).abs().max() < 1e-4


# float32: 1e-5, with TF32 off, torch's default. bfloat16 (flash attention from Ampere on) keeps 8 bits: 2**-7 of values
# near 1, and gradients that are sums of 200 such values.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("window", [None, 5, 150])
def test_attention_equals_that_of_the_cpu(
    device: torch.device, window: int | None, heads: tuple[int, int], dtype: torch.dtype, bound: float
) -> None:
    """Flash attention over variable lengths if the device has it; document by document without it, and in float32."""
    lengths, shape = [200, 1, 30, 129], AttentionShape(*heads, scale=0.2, window=window)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), heads[0] + 2 * heads[1], 64, generator=generator).to(dtype)
    grad_output = torch.randn(sum(lengths), heads[0], 64, generator=generator).to(dtype)
    exact = qkv.double().requires_grad_()
    sizes = [heads[0], heads[1], heads[1]]
    expected = document_attention(*exact.split(sizes, 1), lengths, shape)
    (expected_gradient,) = torch.autograd.grad(expected, exact, grad_output.double())

    on_device = qkv.to(device).requires_grad_()
    output = document_attention(*on_device.split(sizes, 1), lengths, shape)
    (gradient,) = torch.autograd.grad(output, on_device, grad_output.to(device))
    assert output.dtype is dtype
    assert (output.cpu() - expected).abs().max() < bound * expected.abs().max()
    assert (gradient.cpu() - expected_gradient).abs().max() < bound * expected_gradient.abs().max()


def test_flash_attention_is_for_half_precision_from_ampere_on(device: torch.device) -> None:
    is_ampere = torch.cuda.get_device_capability(device) >= (8, 0)
    assert has_flash_attention(torch.zeros(1, 1, 64, dtype=torch.bfloat16, device=device)) is is_ampere
    assert not has_flash_attention(torch.zeros(1, 1, 64, device=device))
    assert not has_flash_attention(torch.zeros(1, 1, 512, dtype=torch.bfloat16, device=device))


# bfloat16 rounds logits of up to 20 by 2**-4, and a loss by as much.
@pytest.mark.parametrize(
    ("dtype", "bound", "gradient_bound"), [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 0.15, 0.03)]
)
def test_the_head_equals_that_of_the_cpu(
    device: torch.device, dtype: torch.dtype, bound: float, gradient_bound: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 16, generator=generator).to(dtype) for size in (HEAD_CHUNK + 10, 5_000))
    targets = torch.randint(5_000, (HEAD_CHUNK + 10,), generator=generator)
    exact = hidden.double().requires_grad_()
    expected = F.cross_entropy(exact @ weight.double().t(), targets, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)

    on_device = hidden.to(device).requires_grad_()
    losses = fused_losses(on_device, weight.to(device), targets.to(device))
    (gradient,) = torch.autograd.grad(losses.nll.sum(), on_device)
    assert losses.nll.dtype is torch.float32
    assert ((losses.nll.cpu() - expected).abs() <= bound * expected.abs().clamp_min(1.0)).all()
    assert (gradient.cpu() - expected_gradient).abs().max() < gradient_bound * expected_gradient.abs().max()


@pytest.mark.parametrize("fast", [True, False], ids=["llama", "general"])
def test_losses_and_gradients_equal_those_of_the_cpu(tiny_model: Path, device: torch.device, fast: bool) -> None:
    """float32 on both sides: losses within 1e-4, gradients within 1e-3 of each tensor's largest."""
    networks = [make_network(tiny_model, place, fast=fast) for place in (CPU, device)]
    assert {network.layers for network in networks} == {"llama" if fast else "general"}
    (expected, expected_gradients), (losses, step_gradients) = (step(network) for network in networks)
    assert (losses - expected).abs().max() < 1e-4
    for name, gradient in expected_gradients.items():
        assert (step_gradients[name] - gradient).abs().max() <= 1e-3 * gradient.abs().max(), name


@pytest.mark.parametrize(
    ("dtype", "loss_bound", "gradient_bound"), [(torch.float32, 1e-4, 1e-3), (torch.bfloat16, 0.05, 0.1)]
)
def test_the_fast_path_equals_the_general_one(
    tiny_model: Path, device: torch.device, dtype: torch.dtype, loss_bound: float, gradient_bound: float
) -> None:
    """On NF4. In bfloat16, rounded logits change losses of about 6 by hundredths, and gradients by some per cent."""
    fast, general = (make_network(tiny_model, device, dtype, fast) for fast in (True, False))
    assert (fast.layers, general.layers) == ("llama", "general")
    (losses, step_gradients), (expected, expected_gradients) = step(fast), step(general)
    assert (losses - expected).abs().max() < loss_bound
    for name, gradient in expected_gradients.items():
        assert (step_gradients[name] - gradient).abs().max() <= gradient_bound * gradient.abs().max(), name


def test_recomputed_activations_give_the_same_gradients(tiny_model: Path, device: torch.device) -> None:
    kept, recomputed = (make_network(tiny_model, device) for _ in range(2))
    assert recomputed.checkpoint()
    _, expected = step(kept)
    for name, gradient in step(recomputed)[1].items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-7), name


def test_gradients_are_the_same_after_an_evaluation(tiny_model: Path, device: torch.device) -> None:
    network = make_network(tiny_model, device)
    _, before = step(network)
    network.model.zero_grad()
    network.evaluate(rows(3))
    for name, gradient in step(network)[1].items():
        assert torch.allclose(gradient, before[name], rtol=1e-4, atol=1e-7), name


def test_the_fingerprint_is_reproducible(tiny_model: Path, device: torch.device) -> None:
    base = load_base(tiny_model, Quantization(), torch.float32, device)
    before = base_fingerprint(base)
    model = attach_adapter(base, Lora(r=4), seed=0)
    assert len(trainable_parameters(model)) == 28
    assert base_fingerprint(model.unload()) == before
    assert peak_memory_bytes(device) > 0
