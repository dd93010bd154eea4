"""What a job takes of disk and of the host's memory. Pure arithmetic; for the trainer, its checkpoints are measured."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_service.planning.adapter_shapes import adapter_shape, optimizer_bytes
from qlora_service.planning.fit import Fit, Question
from qlora_service.planning.memory import GIB
from qlora_service.training.sizes import DATABASE_BYTES, KEPT_CHECKPOINTS, ROW_BYTES, SMALL_FILES_BYTES, STEP_BYTES

HEADER_BYTES = 10 * 256
"""Header of a checkpoint's tensor; a test holds the sum to what checkpoints take"""
ADALORA_COPIES = 3
CUDA_PROCESS_BYTES = 2 * GIB
"""Resident memory of a process once torch has initialized CUDA (pytorch/pytorch#113326)"""
LOADED_AT_A_TIME, LOADED_WIDTH = 4, 2
"""transformers 5.23 reads four tensors at a time (core_model_loading.py), as a rule of two bytes a number"""


@dataclass(frozen=True)
class Storage:
    """Bytes outside the device."""

    adapter_bytes: int
    """The published weights"""
    checkpoint_bytes: int
    disk_bytes: int
    """What has to be free: the checkpoints that are kept, one in the making, and what is published"""
    host_bytes: int
    """The trainer's share of the host's memory; on a CPU, all of it"""


def storage(question: Question, fit: Fit, *, rows: int = 0, total_steps: int = 0) -> Storage:
    """Of a job over so many rows and steps, as far as they are known."""
    training = question.spec.training
    adapter = adapter_shape(question.spec.adapter, question.shape)
    copies = 1 + training.load_best_model_at_end + ADALORA_COPIES * (question.spec.adapter.method == "adalora")
    state, _ = optimizer_bytes(training, adapter.tensors, cuda=False)
    trained = 4 * adapter.parameters
    headers = len(adapter.tensors) * HEADER_BYTES
    checkpoint = copies * trained + state + headers + rows * ROW_BYTES + total_steps * STEP_BYTES + SMALL_FILES_BYTES
    return Storage(
        adapter_bytes=adapter.stored_bytes,
        checkpoint_bytes=checkpoint,
        disk_bytes=(KEPT_CHECKPOINTS + 2) * checkpoint + DATABASE_BYTES,
        host_bytes=_host_bytes(question, fit),
    )


def _host_bytes(question: Question, fit: Fit) -> int:
    if not question.device.cuda:
        return question.device.context_bytes + fit.needed_bytes
    shape = question.shape
    largest_tensor = LOADED_WIDTH * shape.hidden * max(shape.vocabulary, shape.intermediate, shape.queries)
    paged = fit.memory.host if fit.choice.optimizer == "paged" else 0
    return CUDA_PROCESS_BYTES + LOADED_AT_A_TIME * largest_tensor + paged
