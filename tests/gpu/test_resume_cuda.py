"""Resumption from a checkpoint, and out-of-memory retries, on a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from qlora_service.errors import Interrupted
from qlora_service.models.adapters import attach_adapter
from qlora_service.models.base.quantize import load_base
from qlora_service.specs import Lora, Quantization, Training
from qlora_service.training.checkpoint.checkpoints import Checkpoints
from qlora_service.training.device import choose_device, release_memory
from qlora_service.training.evaluation.held_out import trainable_copies
from qlora_service.training.network.isolation import isolate_documents
from tests.tiny_training import CheckpointingControl, Recorder, rows, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TRAINING = Training(batch_size=4, learning_rate=1e-2, micro_batch_tokens=96)


def make_model(tiny_model: Path) -> PeftModel:
    base = load_base(tiny_model, Quantization(), torch.float32, choose_device())
    isolate_documents(base)
    # 2,048 x 64 elements: states large enough that bitsandbytes pages them (from 100,000 on).
    return attach_adapter(base, Lora(r=2048, lora_dropout=0.1), seed=0)


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch"])
def test_a_resumed_training_gives_uninterrupted_weights(tiny_model: Path, tmp_path: Path, optim: str) -> None:
    """Expected: within 1e-4 of each tensor's largest element; bit for bit only if all kernels sum in a fixed order.

    The generator's state is part of the checkpoint.
    """
    training = TRAINING.model_copy(update={"optim": optim})
    uninterrupted = make_model(tiny_model)
    run(uninterrupted, rows(16), training, steps=6)
    expected = trainable_copies(uninterrupted)
    recorder = Recorder()
    control = CheckpointingControl(Checkpoints(tmp_path, 1), recorder, at_check=25)
    with pytest.raises(Interrupted):
        run(make_model(tiny_model), rows(16), training, steps=6, recorder=recorder, control=control)
    latest = Checkpoints(tmp_path, 2).latest()
    assert latest is not None
    resumed = make_model(tiny_model)
    run(resumed, rows(16), training, steps=6, start=latest[0])
    for name, weight in trainable_copies(resumed).items():
        assert (weight - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name


def test_a_gpu_too_small_for_the_micro_batch_gets_a_smaller_one(tiny_model: Path, tmp_path: Path) -> None:
    """The process may use the model's memory and little more: retries shrink the micro-batch until the steps run."""
    device = choose_device()
    model = make_model(tiny_model)
    release_memory(device)
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = torch.cuda.memory_allocated(device) + 192 * 2**20
    recorder = Recorder()
    control = CheckpointingControl(Checkpoints(tmp_path, 1), recorder)
    torch.cuda.set_per_process_memory_fraction(allowed / total, device)
    try:
        training = TRAINING.model_copy(update={"batch_size": 256, "micro_batch_tokens": 32768})
        run(model, rows(256, low=100, high=128), training, steps=2, recorder=recorder, control=control)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert control.changes
    assert all(change["what"] in {"micro_batch_tokens", "gradient_checkpointing"} for change in control.changes)
    assert [metrics.step for metrics in recorder.steps] == [1, 2]
