"""Errors that the service raises on purpose.

    QLoRAError
    ├── InvalidRequest        the request cannot work as it is
    │   ├── InvalidSpec       the job's configuration
    │   ├── InvalidDataset    the uploaded rows
    │   └── InvalidModel      the base model's files
    ├── Unauthenticated       unknown or revoked key
    ├── NotFound              no such job, dataset, model or artifact
    ├── Conflict              the object exists, but its state forbids the action
    ├── TooLarge              above a configured limit
    ├── QuotaExceeded         a quota or a limit on concurrent requests is reached
    │   ├── ObjectLimitReached  a limit on stored objects: deleting helps, waiting does not
    │   │   └── StorageFull     the limit on stored bytes
    │   └── RateLimited         the limit on requests; retry after `details["retry_after_s"]`
    ├── Unavailable           retry later
    ├── ClaimLost             a newer claim owns the job: stop, write nothing
    ├── JobCancelled          the attempt stops for good
    ├── Interrupted           the attempt stops; a later one resumes from its last completed step
    └── JobFailed             the job failed, or its adapter failed a check

The domain knows no HTTP: `api.errors` has the table from errors to status codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Finding:
    """A problem at one place of the input.

    `line` counts from 1: the line of a JSONL, CSV or text file, the row of a JSON array or Parquet file.
    `byte_offset` is the start of that line or row; None for Parquet.
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
    """Base of the tree: a stable `code`, a message that says what to do, and the location of the problem."""

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
        """The error as JSON: code, message, location, findings, details."""
        return {
            "code": self.code,
            "message": self.message,
            "location": self.location,
            "findings": [finding.as_dict() for finding in self.findings],
            "details": self.details,
        }


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


class ObjectLimitReached(QuotaExceeded):
    """Has the code of its base class: to programs it is another quota."""


class StorageFull(ObjectLimitReached):
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
    """With `details["hold"]`, a `domain.jobs.HoldReason`, the job is paused; without it, queued again."""

    code = "interrupted"


class JobFailed(QLoRAError):
    """`details["reason"]` is a `domain.jobs.FailureReason`."""

    code = "job_failed"


def _rebuild(
    kind: type[QLoRAError],
    message: str,
    location: str | None,
    findings: tuple[Finding, ...],
    details: dict[str, Any],
) -> QLoRAError:
    return kind(message, location=location, findings=findings, **details)
