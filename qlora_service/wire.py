"""Answers of the HTTP API as JSON: the fields that the API and the SDK share.

`api.schemas` narrows types to what this version sends; `client.wire` keeps them as wide as an older client needs them.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from qlora_service.domain.row_warnings import RowWarning


class Lengths(BaseModel):
    """Token counts under one base model's tokenizer and chat template."""

    model_config = ConfigDict(from_attributes=True)

    rows: int
    usable_rows: int
    tokens: int
    trained_tokens: int
    longest_tokens: int
    cut_rows: int = Field(description="Usable rows that lose tokens to truncation.")
    too_long_rows: int
    complete: bool = Field(description="False when only the first rows were rendered.")
    histogram: dict[str, int] = Field(description='Rows by length: "128" counts rows of 65 to 128 tokens.')
    finding_count: int
    findings: list[Any]
    finding_kinds: list[RowWarning] = Field(description="All unusable rows, by reason.")
    warnings: list[RowWarning] = Field(description="Usable rows that are not trained as one would expect, by reason.")


class Dataset(BaseModel):
    """An upload that was checked and stored. The same bytes read the same way are one dataset."""

    id: str = Field(examples=["ds_019a9c2f8d31c4e55f0a7b"])
    sha256: str
    filename: str | None
    bytes: int
    container: str
    shape: str
    rows: int
    usable_rows: int
    finding_count: int = Field(description="Exact, also where `findings` holds only the first of them.")
    findings: list[Any]
    finding_kinds: list[RowWarning] = Field(description="All unusable rows, by reason.")
    warnings: list[RowWarning] = Field(
        description="Usable rows that are not trained as one would expect under any base model, by reason."
    )
    created_at: datetime


class PreviewToken(BaseModel):
    id: int
    text: str = Field(description="Bytes that are only a part of a character are written as <0xE4>.")
    trained: bool = Field(description="Whether this token is trained.")


class PreviewDocument(BaseModel):
    """One sequence of tokens."""

    text: str = Field(description="The rendered text; of a truncated row, the text of the tokens that are left.")
    trained_spans: list[tuple[int, int]] = Field(
        description="Start and end, in Unicode characters of `text`, of what is trained."
    )
    appended_stop: str | None = Field(description="The stop token that is trained after a text that ends without one.")
    tokens: list[PreviewToken]
    cut_tokens: int = Field(description="Tokens that truncation took off the end.")


class Model(BaseModel):
    """A base model of the catalog."""

    name: str = Field(examples=["SmolLM2-135M-Instruct"])
    source: str
    hub_id: str | None
    revision: str | None
    weights_sha256: str
    architecture: str
    model_type: str
    parameters: int
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int | None = Field(description="Longest sequence it handles, in tokens.")
    chat_template: bool
    imported_at: datetime


class Recipe(BaseModel):
    """Named values for the fields that a job's spec leaves open, and their source."""

    name: str = Field(description="The value of a spec's `recipe`.", examples=["qlora-paper"])
    title: str
    source: str
    values: dict[str, dict[str, Any]] = Field(
        description="By group of the spec and field.", examples=[{"training": {"learning_rate": 2e-4}}]
    )


class Plan(BaseModel):
    """Whether a job fits, how it would run, what it takes, and why."""

    verdict: str
    reason: str
    device: Any
    settings: Any = Field(description="The fastest that fit; if none do, those that need least memory.")
    longest_tokens: int = Field(description="Tokens of the longest row, or of the longest there may be.")
    memory: Any
    source: str
    is_sure: bool = Field(description="Whether the prediction's error cannot change the verdict.")
    alternatives: list[Any] = Field(
        description="Of `fits_if`: fields to set, with values; each entry alone makes it fit."
    )
    largest: Any = Field(description="Of a job that does not fit as it is.")
    trained_parameters: int
    storage: Any
    bf16_lora_bytes: int = Field(description="Memory of the same job on a base that is not quantized.")
    full_fine_tuning_bytes: int = Field(description="Memory of the same steps with every weight trained.")
    notes: list[str]
    time: dict[str, Any] | None = Field(description="Null when no job has run with this base on this device.")


class Progress(BaseModel):
    step: int = Field(description="Optimizer steps done.")
    total_steps: int | None
    fraction: float | None = Field(description="0 to 1; null until the number of steps is known.")
    eta_s: float | None = Field(description="Seconds until the end, from the speed so far.")


class Job(BaseModel):
    """A fine-tuning job."""

    id: str = Field(examples=["job_019a9c2f8d31c4e55f0a7b"])
    name: str | None
    status: str
    phase: str | None = Field(description="What the running attempt is doing.", examples=["training"])
    progress: Progress
    queue_position: int | None = Field(description="Jobs that run before this queued one.")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    attempt: int = Field(description="Times that it was claimed.")
    stop_request: str | None = Field(
        description="What a running job will do at its next step: end (`cancel`), wait until it is resumed (`pause`), "
        "or go back to the queue for a job with a higher priority (`preempt`)."
    )
    hold: Any = Field(description="Of a paused job: why it waits.")
    checkpoint_step: int = Field(description="Steps in the last checkpoint, from which the job resumes.")
    base_model: str
    dataset_id: str
    metrics: dict[str, Any] = Field(description="The latest, by name.", examples=[{"step": 7, "loss": 1.25}])
    forecast: dict[str, Any] | None = Field(description="Memory and time, as predicted when the job was posted.")
    measured: dict[str, Any] | None = Field(
        description="Memory and time that its attempts took: `actual` beside `predicted` (bytes and seconds), seconds "
        "by phase, tokens per second, and each reported ETA beside the time it took."
    )
    warnings: list[str] = Field(
        description="About its rows, its memory and its training: found when it was posted and by its attempts. Each "
        "is also an event.",
        examples=[["left out: 3 rows (line 4, 9, 12 at /prompt): must be a string, is a number"]],
    )
    error: dict[str, Any] | None = Field(description="Of a failed job: an error as in `Error`.")
    result: dict[str, Any] | None = Field(description="Of a succeeded job: held-out losses, certificate.")


class ArtifactFile(BaseModel):
    """A published file."""

    name: str = Field(examples=["adapter_model.safetensors"])
    bytes: int
    sha256: str
