"""Disk and host memory, predicted without torch, against the trainer's own figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_service.actions.plans import read_config
from qlora_service.models.adapters import attach_adapter
from qlora_service.models.base.quantize import load_base
from qlora_service.planning.cards import Device
from qlora_service.planning.fit import FitQuestion, fastest_fit
from qlora_service.planning.hardware import this_cpu
from qlora_service.planning.shapes import ModelShape
from qlora_service.planning.storage import CUDA_PROCESS_BYTES, Storage, storage
from qlora_service.specs import JobSpec
from qlora_service.training.checkpoint.checkpoints import expected_bytes
from qlora_service.training.network.isolation import isolate_documents
from qlora_service.training.network.network import Network
from qlora_service.training.sizes import DATABASE_BYTES, KEPT_CHECKPOINTS
from tests.qlora_service.planning.test_fit import make_question, with_usable_bytes


def planned_storage(question: FitQuestion, **work: int) -> Storage:
    return storage(question, fastest_fit(question), **work)


@pytest.mark.parametrize(
    "spec",
    [
        {"adapter": {"r": 8}},
        {"adapter": {"r": 8}, "training": {"optim": "paged_adamw_8bit", "load_best_model_at_end": True}},
        {"adapter": {"method": "adalora"}, "training": {"optim": "paged_lion_32bit"}},
    ],
)
def test_checkpoint_has_the_size_that_the_trainer_expects(tiny_model: Path, spec: dict[str, Any]) -> None:
    job = JobSpec.model_validate({"base_model": "tiny"} | spec)
    base = load_base(tiny_model, job.quantization, torch.float32, torch.device("cpu"))
    network = Network(attach_adapter(base, job.adapter, 0, total_steps=10), isolate_documents(base))
    expected = expected_bytes(network, job.training, rows=1000, total_steps=77)
    question = FitQuestion(ModelShape.from_config(read_config(tiny_model)), job, this_cpu(), 128)
    planned = planned_storage(question, rows=1000, total_steps=77).checkpoint_bytes
    assert planned == pytest.approx(expected, rel=0.02)


def test_disk_covers_kept_checkpoints_a_new_one_and_the_artifact() -> None:
    planned = planned_storage(make_question())
    assert planned.disk_bytes == (KEPT_CHECKPOINTS + 2) * planned.checkpoint_bytes + DATABASE_BYTES


def test_paged_state_counts_as_host_memory() -> None:
    question = make_question(adapter={"r": 256}, training={"gradient_checkpointing": True, "micro_batch_tokens": 1024})
    memory = question.estimated_memory(1024, True)
    tight = with_usable_bytes(question, int(memory.reserved * 1.06))
    assert planned_storage(tight).host_bytes - planned_storage(question).host_bytes == memory.host
    assert planned_storage(question).host_bytes > CUDA_PROCESS_BYTES


def test_all_memory_is_host_memory_on_a_cpu() -> None:
    question = make_question(device=Device("x86_64 CPU", 64 * 2**30, cuda=False))
    assert planned_storage(question).host_bytes > fastest_fit(question).needed_bytes
