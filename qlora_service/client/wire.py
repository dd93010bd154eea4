"""What the service answers, as the SDK sees it. Fields that a newer service adds are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from qlora_service.domain.jobs import JobStatus
from qlora_service.errors import Finding, Unavailable

TERMINAL = frozenset(status.value for status in JobStatus if status.terminal)


class Answer(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class Lengths(Answer):
    """Token counts under one base model's tokenizer and chat template."""

    rows: int
    usable_rows: int
    tokens: int
    trained_tokens: int
    longest_tokens: int
    cut_rows: int
    """Usable rows that lose tokens to truncation."""
    too_long_rows: int
    complete: bool
    """False when only the first rows were rendered."""
    histogram: dict[str, int]
    """Rows by length: key "128" counts rows of 65 to 128 tokens."""
    finding_count: int
    findings: list[dict[str, Any]]


class Dataset(Answer):
    id: str
    sha256: str
    filename: str | None
    bytes: int
    container: str
    shape: str
    rows: int
    usable_rows: int
    finding_count: int
    findings: list[dict[str, Any]]
    created_at: datetime
    lengths: Lengths | None = None
    """How long the rows are, when a base model was named."""


class PreviewToken(Answer):
    id: int
    text: str
    trained: bool


class PreviewDocument(Answer):
    """One sequence of tokens."""

    text: str
    tokens: list[PreviewToken]
    cut_tokens: int


class PreviewRow(Answer):
    """A row as it will be trained, or its `problem`: why it is left out."""

    line: int
    problem: str | None = None
    text: str = ""
    tokens: list[PreviewToken] = []
    cut_tokens: int = 0
    rejected: PreviewDocument | None = None
    """Of a preference pair, the rejected answer's document; the row itself is the chosen one's."""


class Model(Answer):
    """A base model of the catalog."""

    name: str
    source: str
    hub_id: str | None
    revision: str | None
    parameters: int
    max_positions: int | None


class Recipe(Answer):
    """Named values for what a job's spec leaves open."""

    name: str
    title: str
    source: str
    values: dict[str, dict[str, Any]]


class Plan(Answer):
    """Whether a job would fit, and how it would run."""

    verdict: str
    """fits | fits_if | does_not_fit"""
    reason: str
    device: dict[str, Any]
    settings: dict[str, Any]
    """The fastest that fits; if none does, what needs least."""
    longest_tokens: int
    memory: dict[str, Any]
    """Bytes, by category and in all."""
    source: str
    """simulation | formula"""
    is_sure: bool
    alternatives: list[dict[str, Any]]
    """Fields to set with which it would fit, each entry by itself."""
    largest: dict[str, Any] | None
    trained_parameters: int
    storage: dict[str, int]
    bf16_lora_bytes: int
    full_fine_tuning_bytes: int
    notes: list[str]
    time: dict[str, Any] | None


class Progress(Answer):
    step: int
    total_steps: int | None
    fraction: float | None
    eta_s: float | None


class Job(Answer):
    id: str
    name: str | None
    status: str
    phase: str | None
    progress: Progress
    queue_position: int | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    attempt: int
    stop_request: str | None
    """What a running job will do at its next step: cancel, pause or preempt."""
    hold: dict[str, Any] | None
    """Why a paused job waits: `reason` and `message`."""
    checkpoint_step: int
    base_model: str
    dataset_id: str
    metrics: dict[str, Any]
    error: dict[str, Any] | None
    result: dict[str, Any] | None
    unreadable: str | None = None
    """Why the service cannot read what the job was asked to do."""
    warnings: list[str] = []

    @property
    def terminal(self) -> bool:
        return self.status in TERMINAL


class ArtifactFile(Answer):
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Event:
    """Something that happened to a job; `seq` is where a later `watch(after=…)` goes on."""

    seq: int
    type: str
    """status | metrics | evaluation | log"""
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
    """No whole answer came from the service."""


class ServiceError(Exception):
    """The service refused: its HTTP status and the parts of its error.

    `retry_after_s` is how long it asks to be left alone.
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
