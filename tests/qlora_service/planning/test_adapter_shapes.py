"""Predicted adapter tensors are those of PEFT, and predicted optimizer state is that of bitsandbytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_service.models.adapters import NAME, attach_adapter, save_adapter
from qlora_service.models.base.quantize import load_base
from qlora_service.planning.adapter_shapes import adapter_shape, optimizer_bytes
from qlora_service.planning.shapes import ModelShape
from qlora_service.specs import JobSpec, Quantization, Training
from qlora_service.training.optimizer import make_optimizer

CPU = torch.device("cpu")
ADAPTERS: list[dict[str, Any]] = [
    {"r": 8},
    {"r": 8, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
    {"r": 4, "init_lora_weights": "olora"},
    {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
    {"r": 4, "trainable_token_indices": [1, 2, 3]},
    {"method": "adalora"},
    {"method": "ia3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    {"method": "vera", "r": 16},
    {"method": "oft", "oft_block_size": 16},
    {"method": "prompt_tuning"},
    {"method": "prefix_tuning"},
    {"method": "p_tuning"},
    {"method": "llama_adapter", "adapter_layers": 1},
]


def attached(model_dir: Path, adapter: dict[str, Any]) -> tuple[Any, Any]:
    """The tiny model with the adapter, and the predicted shapes."""
    spec = JobSpec.model_validate({"base_model": "tiny", "adapter": adapter})
    base = load_base(model_dir, Quantization(type="none"), torch.float32, CPU)
    shape = ModelShape.from_config(json.loads((model_dir / "config.json").read_text()))
    return attach_adapter(base, spec.adapter, 0), adapter_shape(spec.adapter, shape)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: "-".join(map(str, adapter.values())))
def test_tensors_equal_those_of_peft(tiny_model: Path, tmp_path: Path, adapter: dict[str, Any]) -> None:
    model, predicted = attached(tiny_model, adapter)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    assert sorted(trained) == sorted(predicted.tensors)
    buffers = {
        tensor.data_ptr(): tensor.numel()
        for name, tensor in model.named_buffers()
        if NAME in name.split(".") and tensor.is_floating_point()
    }
    assert predicted.frozen == sum(buffers.values())
    save_adapter(model, tmp_path, "tiny", None)
    on_disk = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert predicted.stored_bytes == pytest.approx(on_disk, rel=0.2, abs=8192)  # header with names, and AdaLoRA's ranks


@pytest.mark.parametrize(
    "optim",
    ["paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit", "adamw_torch", "paged_lion_32bit", "paged_lion_8bit"],
)
def test_optimizer_state_has_the_size_of_bitsandbytes_state(optim: Any) -> None:
    training = Training(optim=optim)
    sizes = [64 * 16, 4096, 100_000, 700 * 300]
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(size, 1)) for size in sizes])
    optimizer = make_optimizer(model, training, CPU)
    for parameter in model:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tables = ("qmap1", "qmap2", "step")
    real = sum(
        value.nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if key not in tables and isinstance(value, torch.Tensor)
    )
    resident, paged = optimizer_bytes(training, sizes, cuda=False)
    assert (resident, paged) == (pytest.approx(real, abs=512 * 4 * len(sizes)), 0)


def test_large_state_pages_on_cuda_only() -> None:
    resident, paged = optimizer_bytes(Training(optim="paged_adamw_32bit"), [99_999, 100_000], cuda=True)
    assert (resident, paged) == (2 * 400_384, 800_000)
    assert optimizer_bytes(Training(optim="adamw_torch"), [100_000], cuda=True)[1] == 0
