"""A claim on a job, and the progress that its holder reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Claim:
    """The right to run one attempt of one job, until a later claim exists."""

    job_id: str
    token: int
    """The fencing token: the attempt's number"""

    @property
    def name(self) -> str:
        """Name of the attempt's scratch directory and log."""
        return f"{self.job_id}-{self.token}"


@dataclass(frozen=True)
class Progress:
    """What a running attempt reports; None leaves the stored value unchanged."""

    phase: str | None = None
    step: int | None = None
    total_steps: int | None = None
    eta_s: float | None = None
    metrics: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None
    checkpoint_step: int | None = None
    """Steps in the last durable checkpoint; when it grows, earlier deaths of the job no longer count."""
