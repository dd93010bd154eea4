"""The sums that need torch, made without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_service.actions.plans import read_config
from qlora_service.models.adapters import attach
from qlora_service.models.base.quantize import load_base
from qlora_service.planning.cards import Device
from qlora_service.planning.fit import Question, fastest_fit
from qlora_service.planning.hardware import this_cpu
from qlora_service.planning.shapes import ModelShape
from qlora_service.planning.storage import CUDA_PROCESS_BYTES, Storage, storage
from qlora_service.specs import JobSpec
from qlora_service.training.checkpoint.checkpoints import expected_bytes
from qlora_service.training.network.isolation import isolate_documents
from qlora_service.training.network.network import Network
from qlora_service.training.sizes import DATABASE_BYTES, KEPT_CHECKPOINTS
from tests.qlora_service.planning.test_fit import question, with_free


def stored(asked: Question, **work: int) -> Storage:
    return storage(asked, fastest_fit(asked), **work)


@pytest.mark.parametrize(
    "spec",
    [
        {"adapter": {"r": 8}},
        {"adapter": {"r": 8}, "training": {"optim": "paged_adamw_8bit", "load_best_model_at_end": True}},
        {"adapter": {"method": "adalora"}, "training": {"optim": "paged_lion_32bit"}},
    ],
)
def test_a_checkpoint_is_as_large_as_the_trainer_expects(tiny_model: Path, spec: dict[str, Any]) -> None:
    job = JobSpec.model_validate({"base_model": "tiny"} | spec)
    base = load_base(tiny_model, job.quantization, torch.float32, torch.device("cpu"))
    network = Network(attach(base, job.adapter, 0, total_steps=10), isolate_documents(base))
    expected = expected_bytes(network, job.training, rows=1000, total_steps=77)
    asked = Question(ModelShape.from_config(read_config(tiny_model)), job, this_cpu(), 128)
    planned = stored(asked, rows=1000, total_steps=77).checkpoint_bytes
    assert planned == pytest.approx(expected, rel=0.02)


def test_disk_is_for_all_checkpoints_there_are_at_a_time_and_what_is_published() -> None:
    found = stored(question())
    assert found.disk_bytes == (KEPT_CHECKPOINTS + 2) * found.checkpoint_bytes + DATABASE_BYTES


def test_paged_state_is_in_the_hosts_memory() -> None:
    asked = question(adapter={"r": 256}, training={"gradient_checkpointing": True, "micro_batch_tokens": 1024})
    memory = asked.estimated(1024, True)
    tight = with_free(asked, int(memory.reserved * 1.06))
    assert stored(tight).host_bytes - stored(asked).host_bytes == memory.host
    assert stored(asked).host_bytes > CUDA_PROCESS_BYTES


def test_on_a_cpu_all_of_it_is_the_hosts() -> None:
    asked = question(device=Device("x86_64 CPU", 64 * 2**30, cuda=False))
    assert stored(asked).host_bytes > fastest_fit(asked).needed_bytes
