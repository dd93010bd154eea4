"""The service's answers as types of the SDK."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from qlora_service import wire
from qlora_service.domain.jobs import JobStatus
from qlora_service.domain.row_warnings import RowWarning
from qlora_service.errors import Finding, Unavailable

TERMINAL = frozenset(status.value for status in JobStatus if status.terminal)


class Answer(BaseModel):
    """Base of the types. Fields that a newer service adds are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Lengths(wire.Lengths, Answer):
    findings: list[dict[str, Any]]
    finding_kinds: list[RowWarning] = []
    warnings: list[RowWarning] = []


class Dataset(wire.Dataset, Answer):
    findings: list[dict[str, Any]]
    finding_kinds: list[RowWarning] = []
    warnings: list[RowWarning] = []
    lengths: Lengths | None = None
    """Token lengths of the rows, if the request named a base model"""


class PreviewToken(wire.PreviewToken, Answer):
    pass


class PreviewDocument(wire.PreviewDocument, Answer):
    trained_spans: list[tuple[int, int]] = []
    appended_stop: str | None = None
    tokens: list[PreviewToken]  # type: ignore[assignment]  # a list is invariant


class PreviewRow(PreviewDocument):
    """A row as a job trains it, or the `problem` for which the row is left out."""

    line: int
    problem: str | None = None
    text: str = ""
    tokens: list[PreviewToken] = []
    cut_tokens: int = 0
    rejected: PreviewDocument | None = None
    """The rejected answer of a preference pair; the row itself has the chosen answer"""


class Model(wire.Model, Answer):
    pass


class Recipe(wire.Recipe, Answer):
    pass


class Plan(wire.Plan, Answer):
    device: dict[str, Any]
    settings: dict[str, Any]
    """The fastest settings that fit; if none fit, the settings that need least memory"""
    memory: dict[str, Any]
    """Bytes by category, and their total"""
    alternatives: list[dict[str, Any]]
    """Changes of the spec; each entry alone makes the job fit"""
    largest: dict[str, Any] | None
    storage: dict[str, int]


class Progress(wire.Progress, Answer):
    pass


class Job(wire.Job, Answer):
    progress: Progress
    hold: dict[str, Any] | None
    """Why a paused job waits: `reason` and `message`"""
    forecast: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None
    unreadable: str | None = None
    """Why the service cannot read the job's spec"""
    warnings: list[str] = []

    @property
    def terminal(self) -> bool:
        return self.status in TERMINAL


class ArtifactFile(wire.ArtifactFile, Answer):
    pass


@dataclass(frozen=True)
class Event:
    """An event of a job. `watch(after=seq)` resumes after it."""

    seq: int
    type: str
    """status | metrics | evaluation | log | warning"""
    data: dict[str, Any]

    @property
    def job_id(self) -> str:
        return str(self.data["job_id"])

    @property
    def at(self) -> datetime:
        return datetime.fromisoformat(self.data["at"])

    @property
    def ends_job(self) -> bool:
        return self.type == "status" and self.data.get("status") in TERMINAL


class Unreachable(Unavailable):
    """No complete answer arrived from the service."""


class ServiceError(Exception):
    """An error answer of the service: its HTTP status and the fields of its body.

    `retry_after_s` is the header Retry-After, in seconds.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        location: str | None = None,
        findings: Sequence[Finding] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(status, code, message, location, findings, retry_after_s)
        self.status = status
        self.code = code
        self.message = message
        self.location = location
        self.findings = tuple(findings)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.message} ({self.code}, HTTP {self.status})"
