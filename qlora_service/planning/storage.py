"""Disk space and host memory of a job. Pure arithmetic; the trainer itself measures its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_service.planning.adapter_shapes import ADALORA_STATISTICS, adapter_shape, optimizer_bytes
from qlora_service.planning.fit import Fit, FitQuestion
from qlora_service.planning.memory import FLOAT32_BYTES, GIB
from qlora_service.training.sizes import DATABASE_BYTES, KEPT_CHECKPOINTS, ROW_BYTES, SMALL_FILES_BYTES, STEP_BYTES

HEADER_BYTES = 10 * 256
"""Header of a tensor in a checkpoint; a test compares the sum with real checkpoints"""
CUDA_PROCESS_BYTES = 2 * GIB
"""Resident memory of a process once torch has initialized CUDA (pytorch/pytorch#113326)"""
CONCURRENT_LOADS, LOADED_WIDTH = 4, 2
"""transformers 5.23 reads four tensors at a time (core_model_loading.py), mostly with two bytes per number"""


@dataclass(frozen=True)
class Storage:
    """Bytes on disk and in host memory."""

    adapter_bytes: int
    """The published weights"""
    checkpoint_bytes: int
    disk_bytes: int
    """Free space that the job needs: kept checkpoints, one being written, and the published artifact"""
    host_bytes: int
    """Host memory of the trainer; on a CPU this includes its tensors"""


def storage(question: FitQuestion, fit: Fit, *, rows: int = 0, total_steps: int = 0) -> Storage:
    """Storage of a job; `rows` and `total_steps` are 0 where they are unknown."""
    training = question.spec.training
    adapter = adapter_shape(question.spec.adapter, question.shape)
    statistics = ADALORA_STATISTICS * (question.spec.adapter.method == "adalora")
    copies = 1 + training.load_best_model_at_end + statistics
    state, _ = optimizer_bytes(training, adapter.tensors, cuda=False)
    trained = FLOAT32_BYTES * adapter.trained_parameters
    headers = len(adapter.tensors) * HEADER_BYTES
    checkpoint = copies * trained + state + headers + rows * ROW_BYTES + total_steps * STEP_BYTES + SMALL_FILES_BYTES
    return Storage(
        adapter_bytes=adapter.stored_bytes,
        checkpoint_bytes=checkpoint,
        disk_bytes=(KEPT_CHECKPOINTS + 2) * checkpoint + DATABASE_BYTES,
        host_bytes=_host_bytes(question, fit),
    )


def _host_bytes(question: FitQuestion, fit: Fit) -> int:
    if not question.device.cuda:
        return question.device.context_bytes + fit.needed_bytes
    shape = question.shape
    largest_tensor = LOADED_WIDTH * shape.hidden * max(shape.vocabulary, shape.intermediate, shape.queries)
    paged = fit.memory.host if fit.choice.optimizer == "paged" else 0
    return CUDA_PROCESS_BYTES + CONCURRENT_LOADS * largest_tensor + paged
