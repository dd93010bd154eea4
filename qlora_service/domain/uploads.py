"""An upload in parts, and its parts."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class UploadStatus(StrEnum):
    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True)
class Upload:
    """An upload in parts."""

    id: str
    project: str
    status: UploadStatus
    filename: str
    purpose: str
    mime_type: str
    bytes: int
    """Announced size of the whole file"""
    dataset_id: str | None
    """The dataset that a completed upload became"""
    created_at: datetime
    expires_at: datetime


@dataclass(frozen=True)
class Part:
    """One part of an upload; its bytes are in the artifact store."""

    id: str
    upload_id: str
    bytes: int
    sha256: str
    created_at: datetime
