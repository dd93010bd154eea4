"""What a command's exit code says. Scripts may rely on these numbers."""

from __future__ import annotations

from enum import IntEnum

from qlora_service.cli.options import WrongUsage
from qlora_service.client.transport import TRY_AGAIN
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
    ExitCode.UNREACHABLE: "the service does not answer, or not now",
    ExitCode.JOB_FAILED: "the job that was followed failed",
    ExitCode.JOB_CANCELLED: "the job that was followed was cancelled",
    ExitCode.DOES_NOT_FIT: "the job that was planned does not fit as it is",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C; jobs continue",
}

OF_OUTCOME = {
    "succeeded": ExitCode.DONE,
    "failed": ExitCode.JOB_FAILED,
    "cancelled": ExitCode.JOB_CANCELLED,
}
"""By the status of a job that has ended."""


def of_error(error: Exception) -> ExitCode:
    """The code of a command that ended with this error."""
    if isinstance(error, WrongUsage):
        return ExitCode.USAGE
    away = isinstance(error, Unreachable) or (isinstance(error, ServiceError) and error.status in TRY_AGAIN)
    return ExitCode.UNREACHABLE if away else ExitCode.REFUSED
