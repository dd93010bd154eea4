"""Exit codes of the commands. Scripts may rely on these numbers."""

from __future__ import annotations

from enum import IntEnum

from qlora_service.cli.options import WrongUsage
from qlora_service.client.transport import RETRYABLE_STATUSES
from qlora_service.client.wire import ServiceError, Unreachable


class ExitCode(IntEnum):
    DONE = 0
    REFUSED = 1
    USAGE = 2
    UNREACHABLE = 3
    JOB_FAILED = 4
    JOB_CANCELLED = 5
    DOES_NOT_FIT = 6
    INTERRUPTED = 130


MEANINGS: dict[ExitCode, str] = {
    ExitCode.DONE: "done",
    ExitCode.REFUSED: "refused or failed, or findings in a dataset",
    ExitCode.USAGE: "wrong usage or settings",
    ExitCode.UNREACHABLE: "the service is unreachable, or temporarily unavailable",
    ExitCode.JOB_FAILED: "the followed job failed",
    ExitCode.JOB_CANCELLED: "the followed job was cancelled",
    ExitCode.DOES_NOT_FIT: "the planned job does not fit as it is",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C; jobs continue",
}

CODE_OF_STATUS = {
    "succeeded": ExitCode.DONE,
    "failed": ExitCode.JOB_FAILED,
    "cancelled": ExitCode.JOB_CANCELLED,
}
"""The exit code of a command that followed a job, by the job's terminal status."""


def code_of_error(error: Exception) -> ExitCode:
    """The exit code of a command that ended with this error."""
    if isinstance(error, WrongUsage):
        return ExitCode.USAGE
    is_retryable = isinstance(error, ServiceError) and error.status in RETRYABLE_STATUSES
    return ExitCode.UNREACHABLE if is_retryable or isinstance(error, Unreachable) else ExitCode.REFUSED
