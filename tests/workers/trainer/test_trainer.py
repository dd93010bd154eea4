"""Exceptions of an attempt as typed failures of its job."""

from __future__ import annotations

import pytest
import torch

from qlora_service.domain.jobs import FailureReason
from qlora_service.errors import InvalidModel, JobFailed
from workers.trainer.trainer import as_failure


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), FailureReason.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), FailureReason.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), FailureReason.OUT_OF_MEMORY),
        (MemoryError(), FailureReason.OUT_OF_MEMORY),
        (InvalidModel("bad"), FailureReason.INVALID_INPUT),
        (ValueError("odd, at /home/someone"), FailureReason.INTERNAL),
    ],
)
def test_failures_are_typed(error: Exception, reason: FailureReason) -> None:
    failure = as_failure(error, "logs/x.log")
    assert failure.details["reason"] == reason
    assert "/home/someone" not in failure.message


def test_a_typed_failure_stays_itself() -> None:
    failed = JobFailed("x", reason=FailureReason.NOT_FINITE)
    assert as_failure(failed, "logs/x.log") is failed
