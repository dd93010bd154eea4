"""What a job is and which way it may go. Pure: no clock, no storage.

   ┌──────── lost, preempted ────────┐
   ▼                                 │
queued ──── claim ────▶ running ─────┤
   │                       │         ├──▶ succeeded
   │                       │         ├──▶ failed
   └───── cancel ──────────┴─────────┴──▶ cancelled
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from qlora_service.specs import JobSpec


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return not TRANSITIONS[self]


TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.CANCELLED}),
    JobStatus.RUNNING: frozenset({JobStatus.QUEUED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}


class FailureReason(StrEnum):
    """Why a job failed; `error.details.reason` of a failed job."""

    INVALID_INPUT = "invalid_input"  # the rows or the model turned out unusable
    OUT_OF_MEMORY = "out_of_memory"  # the device's memory, or the host's
    DEVICE_UNAVAILABLE = "device_unavailable"  # the slot's GPU is there, but torch cannot use it
    NOT_FINITE = "not_finite"  # the loss or a gradient became NaN or infinite
    CERTIFICATE = "certificate"  # the published adapter did not give the trained one's loss
    TRAINER_DIED = "trainer_died"  # the process ended by a signal or an exit code of its own
    INTERNAL = "internal"  # a defect in the service


@dataclass(frozen=True)
class Job:
    """One row of the queue. Times are UTC."""

    id: str
    status: JobStatus
    spec: JobSpec
    dataset_id: str
    base_weights_sha256: str
    """The weights that the job was checked against when it was posted."""
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    attempt: int
    """Claims so far; the number of the running claim is its fencing token."""
    cancel_requested: bool
    step: int
    total_steps: int | None
    eta_s: float | None
    """Seconds until the end, from the speed so far."""
    phase: str | None
    """What the running attempt is doing: starting, rendering, loading, training, publishing, certifying."""
    metrics: dict[str, Any]
    """The latest attempt's latest metrics by name."""
    error: dict[str, Any] | None
    result: dict[str, Any] | None
    """Of a succeeded job: the attempt that published, losses, certificate."""


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job; `seq` grows over all jobs and is the SSE id."""

    seq: int
    job_id: str
    at: datetime
    type: str
    """status | metrics | evaluation | log"""
    data: dict[str, Any]
