"""JSON responses of the API: the domain's values, without paths and other values of this machine."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, Self, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field

from qlora_service import wire
from qlora_service.actions.keys import MAX_NAME_CHARS
from qlora_service.artifacts.manifest import ManifestFile
from qlora_service.data.rendering.report import RenderReport
from qlora_service.data.rows.examples import Container, Shape
from qlora_service.domain.datasets import Dataset as DomainDataset
from qlora_service.domain.jobs import HoldReason, JobStatus, StopRequest
from qlora_service.domain.jobs import Job as DomainJob
from qlora_service.domain.keys import DEFAULT_SCOPES, ApiKey, Scope
from qlora_service.models.catalog.catalog import BaseModel as DomainModel
from qlora_service.specs import JobSpec

Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    """A page of items, newest first. `next` is the `after` of the next page; null on the last page."""

    data: list[Item]
    next: str | None


class Listing(BaseModel, Generic[Item]):
    """All items, without pages."""

    data: list[Item]


class Finding(BaseModel):
    """One error at one place of the input."""

    model_config = ConfigDict(from_attributes=True)

    reason: str
    pointer: str = Field(description="JSON pointer (RFC 6901) into the row, or into the body of the request.")
    line: int | None = Field(
        None, description="Line of a JSONL, CSV or text file, or row of a JSON array or Parquet file, from 1."
    )
    byte_offset: int | None = Field(None, description="Byte of the file at which that line or row begins.")


class Error(BaseModel):
    code: str = Field(description="Stable error code for programs.")
    message: str = Field(description="What happened, to which object, and what to do.")
    location: str | None = Field(description="JSON pointer into the body, or name of a parameter, header or form part.")
    findings: list[Finding]
    details: dict[str, Any]


class ErrorResponse(BaseModel):
    """The body of every error response outside /v1."""

    error: Error


class Lengths(wire.Lengths):
    """Token counts under one base model's tokenizer and chat template."""

    findings: list[Finding]


class Dataset(wire.Dataset):
    """An upload that was checked and stored. The same bytes with the same container and shape are one dataset."""

    object: Literal["dataset"] = "dataset"
    container: Container
    shape: Shape
    findings: list[Finding]
    lengths: Lengths | None = Field(None, description="Token lengths of the rows; only with ?base_model.")

    @classmethod
    def of(cls, dataset: DomainDataset, lengths: RenderReport | None = None) -> Dataset:
        return cls(
            id=dataset.id,
            sha256=dataset.sha256,
            filename=dataset.filename,
            created_at=dataset.created_at,
            lengths=None if lengths is None else Lengths.model_validate(lengths),
            **dataset.report.as_dict(),
        )


class DeletedDataset(BaseModel):
    id: str
    object: Literal["dataset"] = "dataset"
    deleted: Literal[True] = True


class PreviewRow(wire.PreviewDocument):
    """A rendered row; for a preference pair, the document with the chosen answer."""

    line: int
    rejected: wire.PreviewDocument | None = Field(
        None, description="For a preference pair, the document with the rejected answer."
    )
    desirable: bool | None = Field(None, description="For a labeled answer (KTO), whether it is desirable.")


class PreviewProblem(BaseModel):
    """A row that will be left out, and the reason."""

    line: int
    problem: str


class Model(wire.Model):
    """A base model of the catalog."""

    source: Literal["directory", "gguf", "hub"]

    @classmethod
    def of(cls, model: DomainModel) -> Model:
        return cls.model_validate(model.as_dict())


class Hold(BaseModel):
    """Why a job is paused."""

    reason: HoldReason = Field(
        description="`user`: until the job is resumed; `disk_full`: the job resumes by itself when the disk has space."
    )
    message: str = Field(examples=["paused until it is resumed"])
    needs_bytes: int | None = Field(None, description="Free space on the data disk that the job needs to resume.")


class Job(wire.Job):
    """A fine-tuning job."""

    object: Literal["job"] = "job"
    status: JobStatus
    stop_request: Annotated[StopRequest | None, wire.Job.model_fields["stop_request"]]
    hold: Annotated[Hold | None, wire.Job.model_fields["hold"]]
    spec: JobSpec | None = Field(
        description="The requested spec with its defaults filled in. Null if another version of the service stored it "
        "in a form that this version cannot read; then `unreadable` has the reason."
    )
    unreadable: str | None = Field(description="Why `spec` is null, and what to do.")
    metadata: dict[str, str]

    @classmethod
    def of(cls, job: DomainJob, queue_position: int | None) -> Job:
        return cls.model_validate(job_fields(job, queue_position))


class Metrics(BaseModel):
    """A page of records in order of steps. `next` is the `after` of the next page; null on the last page."""

    data: list[dict[str, Any]] = Field(examples=[[{"step": 7, "loss": 1.25}]])
    next: int | None


def job_fields(job: DomainJob, queue_position: int | None) -> dict[str, Any]:
    """The field values of a `Job`."""
    progress = wire.Progress(
        step=job.step,
        total_steps=job.total_steps,
        fraction=job.step / job.total_steps if job.total_steps else None,
        eta_s=job.eta_s,
    )
    shared = (
        "id", "status", "phase", "created_at", "started_at", "finished_at", "attempt", "stop_request", "hold",
        "checkpoint_step", "dataset_id", "metrics", "forecast", "measured", "warnings", "error", "result", "unreadable",
    )  # fmt: skip
    return {name: getattr(job, name) for name in shared} | {
        "name": job.spec.name,
        "base_model": job.spec.base_model,
        "metadata": job.spec.metadata,
        "spec": None if job.unreadable else job.spec,
        "progress": progress,
        "queue_position": queue_position,
    }


class Distribution(BaseModel):
    """Distribution of actual divided by predicted: 1 is as predicted, 1.1 is 10 % above the prediction."""

    model_config = ConfigDict(from_attributes=True)

    jobs: int = Field(description="Number of jobs with both an actual and a predicted value.")
    min: float
    p10: float
    p50: float
    p90: float
    max: float


class DeviceAccuracy(BaseModel):
    """Actual over predicted memory and time of the newest jobs on a device; null without a job that has both values."""

    model_config = ConfigDict(from_attributes=True)

    device: str = Field(examples=["NVIDIA GeForce RTX 3090"])
    jobs: int
    allocated: Distribution | None = Field(
        description="Peak bytes of tensors: on CUDA during the whole job, on a CPU during its largest step."
    )
    reserved: Distribution | None = Field(description="Peak bytes held by torch's allocator; only on CUDA.")
    time: Distribution | None = Field(description="Seconds of the job, over the forecast made when it was submitted.")
    eta: Distribution | None = Field(
        description="Seconds from the first step to the end, over the ETA reported at the first step."
    )
    margin: float = Field(
        description="Factor that plans for the device multiply predicted bytes by: learned from finished jobs, at "
        "least 1."
    )


class Artifact(wire.ArtifactFile):
    """A published file."""

    url: str

    @classmethod
    def of(cls, job_id: str, file: ManifestFile) -> Artifact:
        url = f"/jobs/{quote(job_id)}/artifacts/{quote(file.name)}"
        return cls(name=file.name, bytes=file.bytes, sha256=file.sha256, url=url)


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class KeyRequest(BaseModel):
    """The key to create."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=MAX_NAME_CHARS, description="Label: owner or purpose of the key.")
    scopes: list[Annotated[Scope, Field(strict=False)]] = Field(
        default=sorted(DEFAULT_SCOPES),
        min_length=1,
        max_length=len(Scope),
        description="What the key allows: read (GET), submit (everything except keys), admin (keys too). Each scope "
        "includes the ones before it.",
    )


class Key(BaseModel):
    """A key, without the secret."""

    id: str
    project: str = Field(description="Project whose jobs and datasets the key gives access to.")
    name: str
    scopes: list[Scope]
    created_at: datetime
    revoked_at: datetime | None = Field(description="When the key was revoked; null if it is valid.")

    @classmethod
    def of(cls, key: ApiKey) -> Self:
        return cls.model_validate(key.as_dict())


class NewKey(Key):
    secret: str | None = Field(None, description="The key itself, shown only once; null in a replayed response.")
