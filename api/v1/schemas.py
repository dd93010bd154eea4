"""What OpenAI's wire answers about files, uploads, jobs and models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, Field

from api.schemas import Job

Item = TypeVar("Item", bound="Identified")
Purpose = Literal["fine-tune", "fine-tune-results"]

FILE_ID = "file-019a9c2f8d31c4e55f0a7b"
JOB_ID = "job_019a9c2f8d31c4e55f0a7b"
TUNED_MODEL = "ft:SmolLM2-135M-Instruct:local:orders:019a9c2f8d31c4e55f0a7b"
UPLOAD_ID = "upload_019a9c2f8d31c4e55f0a7b"
PART_ID = "part_019a9c2f8d31c4e55f0a7b"


class Identified(BaseModel):
    id: str


class ListPage(BaseModel, Generic[Item]):
    """A page; `last_id` is the `after` of the next one, if there are more."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    first_id: str | None
    last_id: str | None


def page_of(found: Sequence[Item], limit: int) -> ListPage[Item]:
    """The first `limit` of what was found, which is one more if there are more."""
    data = list(found[:limit])
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return ListPage(data=data, has_more=len(found) > limit, first_id=first, last_id=last)


# --- files


class File(Identified):
    """A dataset, or the metrics of a job that has succeeded."""

    id: str = Field(examples=[FILE_ID])
    object: Literal["file"] = "file"
    bytes: int
    created_at: int = Field(description="Seconds since 1970.")
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"
    status_details: str | None = Field(description="Of a dataset with rows that are left out: how many, and the first.")
    expires_at: int | None = Field(None, description="Null: files stay until they are deleted.")


class DeletedFile(Identified):
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


# --- uploads


class Upload(Identified):
    """A file that arrives in parts."""

    id: str = Field(examples=[UPLOAD_ID])
    object: Literal["upload"] = "upload"
    bytes: int = Field(description="Of the whole file, as announced.")
    created_at: int
    expires_at: int = Field(description="When it is removed unless it was completed.")
    filename: str
    purpose: Literal["fine-tune"] = "fine-tune"
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: File | None = Field(None, description="Of a completed upload.")


class UploadPart(Identified):
    id: str = Field(examples=[PART_ID])
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


# --- jobs


class ResolvedHyperparameters(BaseModel):
    """What the job is trained with: never "auto". All null where `qlora.unreadable` says that it is not known."""

    n_epochs: float | None = Field(description="Null where qlora.training.max_steps decides.")
    batch_size: int | None
    learning_rate_multiplier: float | None = Field(description="Times the rate that the job would have by itself.")
    beta: float | None = Field(None, description="Of preference objectives.")


class ResolvedMethod(BaseModel):
    """With the objective's name as `type`, and under that name its hyperparameters."""

    type: str = Field(examples=["supervised"])
    supervised: dict[str, ResolvedHyperparameters] | None = None
    dpo: dict[str, ResolvedHyperparameters] | None = None


class JobError(BaseModel):
    code: str
    message: str
    param: str | None


class FineTuningJob(Identified):
    id: str = Field(examples=[JOB_ID])
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    model: str = Field(description="The base model.")
    fine_tuned_model: str | None = Field(description="Once it has succeeded.", examples=[TUNED_MODEL])
    organization_id: str = Field(description="The project that owns it.")
    status: Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
    training_file: str
    validation_file: str | None
    result_files: list[str] = Field(description="Once it has succeeded: a CSV of its metrics, base64 at its content.")
    trained_tokens: int | None = Field(description="Tokens that its steps went through, once it has succeeded.")
    seed: int | None = Field(description="Null where `qlora.unreadable` says that it is not known.")
    hyperparameters: ResolvedHyperparameters
    method: ResolvedMethod
    error: JobError | None
    estimated_finish: int | None
    integrations: list[Any] = Field(description="None are supported.", max_length=0)
    metadata: dict[str, str]
    qlora: Job = Field(description="The job as GET /jobs/{id} shows it.")


class FineTuningEvent(Identified):
    id: str = Field(examples=["ftevent-42"])
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class CheckpointMetrics(BaseModel):
    step: int
    train_loss: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class FineTuningCheckpoint(Identified):
    id: str = Field(examples=["ftckpt-019a9c2f8d31c4e55f0a7b-88"])
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str = Field(
        description="The model, of the checkpoint that was published. A name that ends in `:ckpt-step-…` is one that "
        "only the job itself goes on from."
    )
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics


# --- models


class Model(Identified):
    """A base model of the catalog, or one that was fine-tuned here."""

    id: str = Field(examples=[TUNED_MODEL])
    object: Literal["model"] = "model"
    created: int
    owned_by: str = Field(description="The project; `base` for the models that all projects start from.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class DeletedModel(Identified):
    object: Literal["model"] = "model"
    deleted: Literal[True] = True
