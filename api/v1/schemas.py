"""Response models for files, uploads, fine-tuning jobs and models, in OpenAI's format."""

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
    """A page of a list. With `has_more`, `last_id` is the cursor `after` of the next page."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    first_id: str | None
    last_id: str | None


def page_of(items: Sequence[Item], limit: int) -> ListPage[Item]:
    """The page of the first `limit` items; there are more if a query for `limit + 1` items returned that many."""
    data = list(items[:limit])
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return ListPage(data=data, has_more=len(items) > limit, first_id=first, last_id=last)


class File(Identified):
    """A dataset, or the metrics of a succeeded job."""

    id: str = Field(examples=[FILE_ID])
    object: Literal["file"] = "file"
    bytes: int
    created_at: int = Field(description="Unix time in seconds.")
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"
    status_details: str | None = Field(
        description="Of a dataset: rows that are left out or not trained as one would expect, by reason."
    )
    expires_at: int | None = Field(None, description="Null: files are stored until they are deleted.")


class DeletedFile(Identified):
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class Upload(Identified):
    """A file that is uploaded in parts."""

    id: str = Field(examples=[UPLOAD_ID])
    object: Literal["upload"] = "upload"
    bytes: int = Field(description="Size of the whole file, as announced.")
    created_at: int
    expires_at: int = Field(description="When the upload is deleted, unless it was completed. Unix time in seconds.")
    filename: str
    purpose: Literal["fine-tune"] = "fine-tune"
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: File | None = Field(None, description="The file of a completed upload.")


class UploadPart(Identified):
    id: str = Field(examples=[PART_ID])
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


class ResolvedHyperparameters(BaseModel):
    """The values that the job is trained with, never "auto". All are null for a job with `qlora.unreadable`."""

    n_epochs: float | None = Field(description="Null if `qlora.training.max_steps` sets the length of the training.")
    batch_size: int | None
    learning_rate_multiplier: float | None = Field(description="Multiple of the job's default learning rate.")
    beta: float | None = Field(None, description="For preference objectives only.")


class ResolvedMethod(BaseModel):
    """The objective as `type`, and its hyperparameters in the field of that name."""

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
    fine_tuned_model: str | None = Field(
        description="The name of the fine-tuned model; null until the job has succeeded.", examples=[TUNED_MODEL]
    )
    organization_id: str = Field(description="The project that owns the job.")
    status: Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
    training_file: str
    validation_file: str | None
    result_files: list[str] = Field(
        description="For a succeeded job: the id of a CSV file of its metrics, whose content is base64-encoded."
    )
    trained_tokens: int | None = Field(description="Tokens that the steps processed; null until the job has succeeded.")
    seed: int | None = Field(description="Null for a job with `qlora.unreadable`.")
    hyperparameters: ResolvedHyperparameters
    method: ResolvedMethod
    error: JobError | None
    estimated_finish: int | None
    integrations: list[Any] = Field(description="Not supported: always empty.", max_length=0)
    metadata: dict[str, str]
    qlora: Job = Field(description="The job in the format of GET /jobs/{id}.")


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
        description="The model name of the published checkpoint. A name that ends in `:ckpt-step-…` cannot be used: "
        "only the job itself resumes from that checkpoint."
    )
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics


class Model(Identified):
    """A base model of the catalog, or a fine-tuned model."""

    id: str = Field(examples=[TUNED_MODEL])
    object: Literal["model"] = "model"
    created: int
    owned_by: str = Field(description="The owning project; `base` for base models.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class DeletedModel(Identified):
    object: Literal["model"] = "model"
    deleted: Literal[True] = True
