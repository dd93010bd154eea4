"""Jobs, their events, and the state machine of their status.

   ┌───── resume ────── paused ◀─── pause, disk full ───┐
   ▼                      ▲                             │
queued ────── pause ──────┘                             │
   │ ▲                                                  │
   │ └───── worker lost or stopped, preempted ──────┐   │
   ├──────────────────── claim ─────────────────▶ running ──▶ succeeded | failed
   │                                                │
   └──── cancel (also of a paused job) ─────────────┴───────▶ cancelled
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
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return not TRANSITIONS[self]


TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.CANCELLED}),
    JobStatus.RUNNING: frozenset(
        {JobStatus.QUEUED, JobStatus.PAUSED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}
    ),
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}


def sources_of(status: JobStatus) -> list[JobStatus]:
    """The statuses from which a job may get `status`."""
    return [source for source, targets in TRANSITIONS.items() if status in targets]


class StopRequest(StrEnum):
    """A request to a running attempt, for its next step boundary."""

    CANCEL = "cancel"
    PAUSE = "pause"
    PREEMPT = "preempt"  # for a job with a higher priority or a chat: back to the queue


class HoldReason(StrEnum):
    """Why a job is paused; `hold.reason`."""

    USER = "user"  # until its user resumes it
    DISK_FULL = "disk_full"  # until enough disk space is free; resumed automatically


class FailureReason(StrEnum):
    """Why a job failed; `error.details.reason` of a failed job."""

    INVALID_INPUT = "invalid_input"  # the rows or the model are unusable
    OUT_OF_MEMORY = "out_of_memory"  # the device's memory, even with the smallest micro-batch
    HOST_OUT_OF_MEMORY = "host_out_of_memory"  # the kernel killed the trainer because the host's memory ran out
    DEVICE_UNAVAILABLE = "device_unavailable"  # torch cannot use the slot's GPU
    NOT_FINITE = "not_finite"  # the loss or a gradient became NaN or infinite
    CERTIFICATE = "certificate"  # the published adapter did not give the trained adapter's held-out loss
    TRAINER_DIED = "trainer_died"  # attempts kept dying without a new checkpoint
    INTERNAL = "internal"  # a defect in the service


@dataclass(frozen=True)
class Job:
    """A job. Times are UTC."""

    id: str
    status: JobStatus
    project: str
    """Its owner: only keys of this project see it, and it counts towards the project's limits"""
    spec: JobSpec
    dataset_id: str
    base_weights_sha256: str
    """SHA-256 of the base's weights when the job was posted"""
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    attempt: int
    """Number of claims so far; while running, the fencing token"""
    stop_request: StopRequest | None
    hold: dict[str, Any] | None
    """Of a paused job: `reason`, `message`, and for a full disk `needs_bytes`"""
    plan: dict[str, Any] | None
    """Execution settings chosen by the first attempt, reused by later ones"""
    forecast: dict[str, Any] | None
    """Memory, and time if this machine has a history, predicted when the job was posted"""
    measured: dict[str, Any] | None
    """Measured memory and time of its attempts, beside the predictions"""
    step: int
    checkpoint_step: int
    """Steps in the last durable checkpoint"""
    deaths: list[dict[str, Any]]
    """Attempts without an outcome since the last new checkpoint: `attempt`, `step`, `phase`, `message`, `reason`"""
    total_steps: int | None
    eta_s: float | None
    """Seconds until the end, from the speed so far."""
    phase: str | None
    """Of the running attempt: starting, rendering, loading, training, generating, publishing, certifying"""
    metrics: dict[str, Any]
    """Latest metrics of the latest attempt, by name"""
    warnings: list[str]
    """Of its submission and of its attempts, each once"""
    error: dict[str, Any] | None
    result: dict[str, Any] | None
    """Of a succeeded job: the published attempt, losses, certificate"""
    withdrawn_at: datetime | None
    """When its adapter was deleted"""
    unreadable: str | None = None
    """Why the stored spec cannot be read; `spec` then has base model, name, metadata and priority only"""

    @property
    def published_attempt(self) -> int | None:
        """The attempt whose artifacts can be downloaded: a succeeded one, or a failed one that kept its adapter."""
        if self.result is not None:
            return int(self.result["attempt"])
        kept = (self.error or {}).get("details", {}).get("kept_attempt")
        return None if kept is None else int(kept)


@dataclass(frozen=True)
class JobEvent:
    """An event of a job; `seq` grows over all jobs and is the SSE id."""

    seq: int
    job_id: str
    at: datetime
    type: str
    """status | metrics | evaluation | log | warning"""
    data: dict[str, Any]
