"""Every error the service raises on purpose.

    QLoRAError
    ├── InvalidRequest        what was sent cannot work as it is
    │   ├── InvalidSpec       the job's configuration
    │   ├── InvalidDataset    the uploaded rows
    │   └── InvalidModel      the base model's files
    ├── Unauthenticated       nobody is known by this key
    ├── NotFound              no such job, dataset, model or artifact
    ├── Conflict              it exists, but its state forbids the action
    ├── TooLarge              over a configured limit
    ├── QuotaExceeded         the project has as much of it as is allowed at a time
    │   ├── NoRoom            of what stays: waiting does not help, deleting does
    │   │   └── StorageFull   of stored bytes
    │   └── RateLimited       of requests: `details["retry_after_s"]` says when to go on
    ├── Unavailable           try again later
    ├── ClaimLost             a newer claim owns the job; stop and write nothing
    ├── JobCancelled          the trainer was asked to stop, and never to go on
    ├── Interrupted           the training stops here, to go on later from what was completed
    └── JobFailed             a job ended without an adapter

The domain knows no HTTP: `api.errors` holds the one table from these to status codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Finding:
    """One thing wrong with one place of the input.

    `line` counts from 1: the line of a JSONL, CSV or text file, the row of a JSON array or Parquet file.
    `byte_offset` is where that line or row begins; None where the container has no such thing (Parquet).
    `pointer` is a JSON pointer (RFC 6901) into the row, or into the request's body.
    """

    reason: str
    pointer: str = ""
    line: int | None = None
    byte_offset: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        place = f"line {self.line}" if self.line is not None else ""
        if self.pointer:
            place = f"{place} at {self.pointer}" if place else self.pointer
        return f"{place}: {self.reason}" if place else self.reason


class QLoRAError(Exception):
    """Base of the tree: a stable `code`, a message that says what to do, and where the trouble is."""

    code: ClassVar[str] = "internal_error"

    def __init__(
        self, message: str, *, location: str | None = None, findings: Sequence[Finding] = (), **details: Any
    ) -> None:
        super().__init__(message)
        self.message = message
        self.location = location
        self.findings = tuple(findings)
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.location, self.findings, self.details))

    def as_dict(self) -> dict[str, Any]:
        """The one wire shape of an error: code, message, location, findings, details."""
        return {
            "code": self.code,
            "message": self.message,
            "location": self.location,
            "findings": [finding.as_dict() for finding in self.findings],
            "details": self.details,
        }


def _rebuild(
    kind: type[QLoRAError],
    message: str,
    location: str | None,
    findings: tuple[Finding, ...],
    details: dict[str, Any],
) -> QLoRAError:
    return kind(message, location=location, findings=findings, **details)


class InvalidRequest(QLoRAError):
    code = "invalid_request"


class InvalidSpec(InvalidRequest):
    code = "invalid_spec"


class InvalidDataset(InvalidRequest):
    code = "invalid_dataset"


class InvalidModel(InvalidRequest):
    code = "invalid_model"


class Unauthenticated(QLoRAError):
    code = "unauthenticated"


class NotFound(QLoRAError):
    code = "not_found"


class Conflict(QLoRAError):
    code = "conflict"


class TooLarge(QLoRAError):
    code = "too_large"


class QuotaExceeded(QLoRAError):
    code = "quota_exceeded"


class NoRoom(QuotaExceeded):
    """Keeps its base's code: for programs it is one more quota."""


class StorageFull(NoRoom):
    pass


class RateLimited(QuotaExceeded):
    code = "rate_limited"


class Unavailable(QLoRAError):
    code = "unavailable"


class ClaimLost(QLoRAError):
    code = "claim_lost"


class JobCancelled(QLoRAError):
    code = "job_cancelled"


class Interrupted(QLoRAError):
    """`details["hold"]`, one of the names in `jobs.HoldReason`, says what it waits for; without one it is queued."""

    code = "interrupted"


class JobFailed(QLoRAError):
    """A job ended without an adapter; `details["reason"]` is one of the names in `jobs.FailureReason`."""

    code = "job_failed"
