"""What a job is and which way it may go. Pure: no clock, no storage.

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
    """What a running attempt is asked to do at its next step boundary."""

    CANCEL = "cancel"
    PAUSE = "pause"
    PREEMPT = "preempt"  # a more urgent job waits: back to the queue


class HoldReason(StrEnum):
    """Why a paused job waits; `hold.reason`."""

    USER = "user"  # until somebody resumes it
    DISK_FULL = "disk_full"  # until there is room: it is resumed by itself


class FailureReason(StrEnum):
    """Why a job failed; `error.details.reason` of a failed job."""

    INVALID_INPUT = "invalid_input"  # the rows or the model turned out unusable
    OUT_OF_MEMORY = "out_of_memory"  # the device's memory, with the smallest micro-batch there is
    HOST_OUT_OF_MEMORY = "host_out_of_memory"  # the kernel killed the trainer, because the host's memory ran out
    DEVICE_UNAVAILABLE = "device_unavailable"  # the slot's GPU is there, but torch cannot use it
    NOT_FINITE = "not_finite"  # the loss or a gradient became NaN or infinite
    CERTIFICATE = "certificate"  # the published adapter did not give the trained one's loss
    TRAINER_DIED = "trainer_died"  # attempts kept ending without an outcome, and without getting further
    INTERNAL = "internal"  # a defect in the service


@dataclass(frozen=True)
class Job:
    """One row of the queue. Times are UTC."""

    id: str
    status: JobStatus
    project: str
    """Who owns it: whose quota it counts for, and who sees it."""
    spec: JobSpec
    dataset_id: str
    base_weights_sha256: str
    """The weights that the job was checked against when it was posted."""
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    attempt: int
    """Claims so far; the number of the running claim is its fencing token."""
    stop_request: StopRequest | None
    hold: dict[str, Any] | None
    """Why a paused job waits: `reason`, `message`, and of a full disk `needs_bytes`."""
    plan: dict[str, Any] | None
    """What the first attempt chose for this machine; later attempts take it over."""
    forecast: dict[str, Any] | None
    """What was predicted when it was posted: memory, and time where this machine has a history."""
    measured: dict[str, Any] | None
    """What its attempts took of memory and time, beside what was predicted for them."""
    step: int
    checkpoint_step: int
    """Steps that a lost attempt would not have to do again."""
    deaths: list[dict[str, Any]]
    """How attempts ended without an outcome since the job last got further."""
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
    withdrawn_at: datetime | None
    """When its adapter was deleted."""
    unreadable: str | None = None
    """Why the stored spec cannot be read; then `spec` holds base model, name, metadata and priority, and no more of
    what was asked for."""

    @property
    def published_attempt(self) -> int | None:
        """The attempt whose artifacts can be downloaded: a succeeded one, or a failed one that kept its adapter."""
        if self.result is not None:
            return int(self.result["attempt"])
        kept = (self.error or {}).get("details", {}).get("kept_attempt")
        return None if kept is None else int(kept)


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job; `seq` grows over all jobs and is the SSE id."""

    seq: int
    job_id: str
    at: datetime
    type: str
    """status | metrics | evaluation | log"""
    data: dict[str, Any]
