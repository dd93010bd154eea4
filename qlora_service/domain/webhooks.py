"""A webhook endpoint, and a delivery to it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from qlora_service.domain.jobs import JobStatus

EVENT_TYPES = {
    JobStatus.SUCCEEDED: "fine_tuning.job.succeeded",
    JobStatus.FAILED: "fine_tuning.job.failed",
    JobStatus.CANCELLED: "fine_tuning.job.cancelled",
}
"""What can be told, by how a job ends."""


@dataclass(frozen=True)
class Endpoint:
    """Where a project is told how its jobs end."""

    id: str
    project: str
    name: str
    url: str
    event_types: list[str]
    secret: str
    created_at: datetime
    disabled_at: datetime | None = None
    """When it said that it is gone."""
    old_secret: str | None = None
    """Signs too, until `old_secret_until`."""
    old_secret_until: datetime | None = None

    def secrets_at(self, now: datetime) -> list[str]:
        """What signs a message that is sent now, the newest secret first."""
        if self.old_secret is None or self.old_secret_until is None or now >= self.old_secret_until:
            return [self.secret]
        return [self.secret, self.old_secret]


@dataclass(frozen=True)
class Delivery:
    """One event for one endpoint, and how far it got."""

    id: str
    endpoint_id: str
    event_id: str
    type: str
    body: dict[str, Any]
    created_at: datetime
    due_at: datetime | None
    """When it is tried next; None once it was delivered or given up."""
    attempts: int = 0
    delivered_at: datetime | None = None
    last_status: int | None = None
    last_error: str | None = None
