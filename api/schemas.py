"""What the API answers: the domain's values as JSON, without anything that is only true on this machine."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, Self, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field

from qlora_service import wire
from qlora_service.actions.keys import MAX_NAME_CHARS
from qlora_service.artifacts.manifest import ManifestFile
from qlora_service.data.rendering.renderer import RenderReport
from qlora_service.data.rows.examples import Container, Shape
from qlora_service.domain.datasets import Dataset as DomainDataset
from qlora_service.domain.jobs import HoldReason, JobStatus, StopRequest
from qlora_service.domain.jobs import Job as DomainJob
from qlora_service.domain.keys import DEFAULT_SCOPES, ApiKey, Scope
from qlora_service.models.catalog.catalog import BaseModel as DomainModel
from qlora_service.specs import JobSpec

Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    """Newest first. `next` is the `after` of the next page; null on the last."""

    data: list[Item]
    next: str | None


class Listing(BaseModel, Generic[Item]):
    """All there are."""

    data: list[Item]


# --- errors


class Finding(BaseModel):
    """One thing wrong with one place of the input."""

    model_config = ConfigDict(from_attributes=True)

    reason: str
    pointer: str = Field(description="JSON pointer (RFC 6901) into the row, or into the request's body.")
    line: int | None = Field(
        None, description="From 1: line of a JSONL, CSV or text file, row of a JSON array or Parquet file."
    )
    byte_offset: int | None = Field(None, description="Where that line or row begins in the file.")


class Error(BaseModel):
    code: str = Field(description="Stable: programs may rely on it.")
    message: str = Field(description="What happened, to which object, and what to do.")
    location: str | None = Field(description="JSON pointer into the body, or the name of a parameter.")
    findings: list[Finding]
    details: dict[str, Any]


class ErrorResponse(BaseModel):
    """Every error, of every route."""

    error: Error


# --- datasets


class Lengths(wire.Lengths):
    """Token counts under one base model's tokenizer and chat template."""

    findings: list[Finding]


class Dataset(wire.Dataset):
    """An upload that was checked and stored. The same bytes read the same way are one dataset."""

    object: Literal["dataset"] = "dataset"
    container: Container
    shape: Shape
    findings: list[Finding]
    lengths: Lengths | None = Field(None, description="With ?base_model: token lengths of the rows.")

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
    """A row as it will be trained; of a preference pair, the chosen answer's document."""

    line: int
    rejected: wire.PreviewDocument | None = Field(
        None, description="Of a preference pair, the rejected answer's document."
    )
    desirable: bool | None = Field(None, description="Of a labelled answer (KTO), whether it is wanted.")


class PreviewProblem(BaseModel):
    """A row that will be left out, and why."""

    line: int
    problem: str


# --- base models


class Model(wire.Model):
    """A base model of the catalog."""

    source: Literal["directory", "gguf", "hub"]

    @classmethod
    def of(cls, model: DomainModel) -> Model:
        return cls.model_validate(model.as_dict())


# --- jobs


class Hold(BaseModel):
    """Why a paused job waits."""

    reason: HoldReason = Field(description="`user`: until it is resumed; `disk_full`: until there is room, by itself.")
    message: str = Field(examples=["paused until it is resumed"])
    needs_bytes: int | None = Field(None, description="Free space on the data disk with which it goes on.")


class Job(wire.Job):
    """A fine-tuning job."""

    object: Literal["job"] = "job"
    status: JobStatus
    stop_request: Annotated[StopRequest | None, wire.Job.model_fields["stop_request"]]
    hold: Annotated[Hold | None, wire.Job.model_fields["hold"]]
    spec: JobSpec | None = Field(
        description="As requested, with its defaults. Null when another version stored it, in a form that this one "
        "cannot read; `unreadable` says so."
    )
    unreadable: str | None = Field(description="Why there is no `spec`, and what to do.")
    metadata: dict[str, str]

    @classmethod
    def of(cls, job: DomainJob, queue_position: int | None) -> Job:
        return cls.model_validate(job_fields(job, queue_position))


class Metrics(BaseModel):
    """Records by step. `next` is the `after` of the next page; null on the last."""

    data: list[dict[str, Any]] = Field(examples=[[{"step": 7, "loss": 1.25}]])
    next: int | None


class SubmittedJob(Job):
    """A queued job and what its submitter should know."""

    warnings: list[str] = Field(examples=[["3 rows are truncated to 1024 tokens"]])


def job_fields(job: DomainJob, queue_position: int | None) -> dict[str, Any]:
    """The fields of `Job`."""
    progress = wire.Progress(
        step=job.step,
        total_steps=job.total_steps,
        fraction=job.step / job.total_steps if job.total_steps else None,
        eta_s=job.eta_s,
    )
    shared = (
        "id", "status", "phase", "created_at", "started_at", "finished_at", "attempt", "stop_request", "hold",
        "checkpoint_step", "dataset_id", "metrics", "forecast", "measured", "error", "result", "unreadable",
    )  # fmt: skip
    return {name: getattr(job, name) for name in shared} | {
        "name": job.spec.name,
        "base_model": job.spec.base_model,
        "metadata": job.spec.metadata,
        "spec": None if job.unreadable else job.spec,
        "progress": progress,
        "queue_position": queue_position,
    }


# --- plans


class Distribution(BaseModel):
    """Of actual over predicted: 1 is as predicted, 1.1 a tenth more than that."""

    model_config = ConfigDict(from_attributes=True)

    jobs: int = Field(description="That have both.")
    min: float
    p10: float
    p50: float
    p90: float
    max: float


class DeviceAccuracy(BaseModel):
    """How near predictions came to what the newest jobs on a device took. Null where no job has both."""

    model_config = ConfigDict(from_attributes=True)

    device: str = Field(examples=["NVIDIA GeForce RTX 3090"])
    jobs: int
    allocated: Distribution | None = Field(
        description="Peak bytes of tensors: on CUDA over the whole job, on a CPU of its largest step."
    )
    reserved: Distribution | None = Field(description="Peak bytes held by torch's allocator, on CUDA.")
    time: Distribution | None = Field(description="Seconds, over those forecast when the job was posted.")
    eta: Distribution | None = Field(description="Seconds from the first step on, over those promised then.")
    margin: float = Field(description="What plans for the device multiply predicted bytes with: learned, 1 at least.")


# --- artifacts


class Artifact(wire.ArtifactFile):
    """A published file."""

    url: str

    @classmethod
    def of(cls, job_id: str, file: ManifestFile) -> Artifact:
        url = f"/jobs/{quote(job_id)}/artifacts/{quote(file.name)}"
        return cls(name=file.name, bytes=file.bytes, sha256=file.sha256, url=url)


# --- health


class Health(BaseModel):
    status: Literal["ok"] = "ok"


# --- keys


class KeyRequest(BaseModel):
    """A key to be made."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=MAX_NAME_CHARS, description="For people: whose it is, or what for.")
    scopes: list[Annotated[Scope, Field(strict=False)]] = Field(
        default=sorted(DEFAULT_SCOPES),
        min_length=1,
        max_length=len(Scope),
        description="What it allows: read (GET), submit (everything but keys), admin (keys, too). Each includes the "
        "ones before it.",
    )


class Key(BaseModel):
    """A key, without the secret."""

    id: str
    project: str = Field(description="Whose jobs and datasets it opens.")
    name: str
    scopes: list[Scope]
    created_at: datetime
    revoked_at: datetime | None = Field(description="Since when it is refused.")

    @classmethod
    def of(cls, key: ApiKey) -> Self:
        return cls.model_validate(key.as_dict())


class NewKey(Key):
    secret: str | None = Field(None, description="The key itself, shown once; null in an answer that is given again.")
