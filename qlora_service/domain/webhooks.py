"""Webhook endpoints and deliveries."""

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
"""The event types, by the final status of a job."""


@dataclass(frozen=True)
class Endpoint:
    """A URL that is notified when jobs of a project end."""

    id: str
    project: str
    name: str
    url: str
    event_types: list[str]
    secret: str
    created_at: datetime
    disabled_at: datetime | None = None
    """When the endpoint answered 410 Gone"""
    old_secret: str | None = None
    """The previous secret, which also signs messages until `old_secret_until`"""
    old_secret_until: datetime | None = None

    def secrets_at(self, now: datetime) -> list[str]:
        """The secrets that sign a message sent at `now`, newest first."""
        if self.old_secret is None or self.old_secret_until is None or now >= self.old_secret_until:
            return [self.secret]
        return [self.secret, self.old_secret]


@dataclass(frozen=True)
class Delivery:
    """One event for one endpoint, and the state of its delivery."""

    id: str
    endpoint_id: str
    event_id: str
    type: str
    body: dict[str, Any]
    created_at: datetime
    due_at: datetime | None
    """Time of the next attempt; None after success or the last attempt"""
    attempts: int = 0
    delivered_at: datetime | None = None
    last_status: int | None = None
    last_error: str | None = None
