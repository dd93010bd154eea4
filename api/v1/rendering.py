"""Conversion of jobs, events and checkpoints to OpenAI's format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from api.schemas import Job as NativeJob
from api.v1.ids import file_of_dataset, results_of_job
from api.v1.schemas import (
    CheckpointMetrics,
    FineTuningCheckpoint,
    FineTuningEvent,
    FineTuningJob,
    JobError,
    ResolvedHyperparameters,
    ResolvedMethod,
)
from api.v1.translation import default_rate
from qlora_service.domain.jobs import Job, JobEvent, JobStatus
from qlora_service.domain.metrics import METRICS, valid_metrics
from qlora_service.domain.tuned_models import tuned_model_name

EVENT_TYPES = ("status", "log", "warning", *METRICS)

_STATUS_MESSAGES = {
    JobStatus.QUEUED: "The job is queued",
    JobStatus.RUNNING: "The job has started",
    JobStatus.PAUSED: "The job is paused",
    JobStatus.SUCCEEDED: "The job has successfully completed",
    JobStatus.FAILED: "The job has failed",
    JobStatus.CANCELLED: "The job was cancelled",
}


def seconds(time: datetime) -> int:
    """The Unix time in whole seconds."""
    return int(time.timestamp())


def fine_tuning_job(
    job: Job, queue_position: int | None, now: datetime, ends_in_s: float | None = None
) -> FineTuningJob:
    """The job in OpenAI's format; `ends_in_s` is the predicted time until a queued job ends, if it is known."""
    spec, validation_id = job.spec, job.spec.validation.dataset_id
    hyperparameters = _hyperparameters(job)
    objective = spec.objective.type
    method = ResolvedMethod(type=objective)
    if objective in {"supervised", "dpo"}:
        method = ResolvedMethod.model_validate({"type": objective, objective: {"hyperparameters": hyperparameters}})
    remaining_s = job.eta_s if job.status is JobStatus.RUNNING else ends_in_s
    succeeded = job.status is JobStatus.SUCCEEDED
    return FineTuningJob(
        id=job.id,
        created_at=seconds(job.created_at),
        finished_at=None if job.finished_at is None else seconds(job.finished_at),
        model=spec.base_model,
        fine_tuned_model=tuned_model_name(job),
        organization_id=job.project,
        status=job.status.value,
        training_file=file_of_dataset(job.dataset_id),
        validation_file=None if validation_id is None else file_of_dataset(validation_id),
        result_files=[results_of_job(job.id)] if succeeded else [],
        trained_tokens=(job.result or {}).get("tokens"),
        seed=None if job.unreadable else spec.training.seed,
        hyperparameters=hyperparameters,
        method=method,
        error=None if job.error is None else _job_error(job.error),
        estimated_finish=None if remaining_s is None else seconds(now + timedelta(seconds=remaining_s)),
        integrations=[],
        metadata=spec.metadata,
        qlora=NativeJob.of(job, queue_position),
    )


def fine_tuning_event(event: JobEvent, job: Job) -> FineTuningEvent:
    level, message, data = "info", "", dict(event.data)
    is_metrics = event.type in METRICS
    if is_metrics:
        data = _metrics(event.data, job) | {"total_steps": job.total_steps}
        of_total = "" if job.total_steps is None else f"/{job.total_steps}"
        message = f"Step {data['step']}{of_total}: {_loss(event.data, job)}"
    elif event.type == "status":
        status = JobStatus(event.data["status"])
        reason = (event.data.get("error") or event.data.get("hold") or {}).get("message", event.data.get("reason"))
        message = f"{_STATUS_MESSAGES[status]}: {reason}" if reason else _STATUS_MESSAGES[status]
        level = "error" if status is JobStatus.FAILED else "info"
    else:
        message = str(event.data.get("message", event.type))
        level = "warn" if event.type == "warning" else "info"
    return FineTuningEvent(
        id=f"ftevent-{event.seq}",
        created_at=seconds(event.at),
        level=level,
        message=message,
        type="metrics" if is_metrics else "message",
        data=data,
    )


def fine_tuning_checkpoints(job: Job, events: Sequence[JobEvent]) -> list[FineTuningCheckpoint]:
    """The existing checkpoint: the published one of a succeeded job, or the one that an unfinished job resumes from."""
    model = tuned_model_name(job)
    if job.result is not None and job.withdrawn_at is None:
        best = job.result.get("best_step")
        step = int(job.result.get("steps", job.step) if best is None else best)
    elif not job.status.terminal and job.checkpoint_step > 0:
        step = job.checkpoint_step
    else:
        return []
    metrics: dict[str, Any] = {"step": step}
    for record in valid_metrics(events):
        if record["step"] == step:
            metrics |= _metrics(record, job)
    recorded_at = [event.at for event in events if event.type in METRICS and event.data["step"] == step]
    return [
        FineTuningCheckpoint(
            id=f"ftckpt-{job.id.removeprefix('job_')}-{step}",
            created_at=seconds(recorded_at[-1] if recorded_at else job.created_at),
            fine_tuned_model_checkpoint=model or f"ft:{job.spec.base_model}:{job.project}::ckpt-step-{step}",
            fine_tuning_job_id=job.id,
            step_number=step,
            metrics=CheckpointMetrics(**metrics),
        )
    ]


def _hyperparameters(job: Job) -> ResolvedHyperparameters:
    if job.unreadable:
        return ResolvedHyperparameters(n_epochs=None, batch_size=None, learning_rate_multiplier=None, beta=None)
    training, objective = job.spec.training, job.spec.objective
    multiplier = training.learning_rate / default_rate(job.spec.recipe)
    return ResolvedHyperparameters(
        n_epochs=training.epochs if training.max_steps is None else None,
        batch_size=training.batch_size,
        learning_rate_multiplier=round(multiplier, 9),  # drops the rounding error of the quotient
        beta=getattr(objective, "beta", None),
    )


def _job_error(error: dict[str, Any]) -> JobError:
    code = error.get("details", {}).get("reason", error["code"])
    param = "training_file" if error.get("findings") else None  # findings are about rows of this file
    return JobError(code=str(code), message=error["message"], param=param)


def _loss(record: dict[str, Any], job: Job) -> str:
    """Name and value of the loss of a step or an evaluation, for an event message."""
    evaluation = "validation loss" if job.spec.validation.holds_out else "loss on training rows"
    name, loss = ("training loss", record["loss"]) if "loss" in record else (evaluation, record["eval_loss"])
    return f"{name} is not finite" if loss is None or not math.isfinite(loss) else f"{name}={loss:.4f}"


def _metrics(record: dict[str, Any], job: Job) -> dict[str, Any]:
    """A record of a step or an evaluation under OpenAI's names.

    `full_` values equal the others, because an evaluation always covers all held-out rows.
    """
    if "loss" in record:
        return {"step": record["step"], "train_loss": record["loss"]}
    if not job.spec.validation.holds_out:
        return {"step": record["step"]}
    loss, accuracy = record["eval_loss"], record["eval_accuracy"]
    return {
        "step": record["step"],
        "valid_loss": loss,
        "valid_mean_token_accuracy": accuracy,
        "full_valid_loss": loss,
        "full_valid_mean_token_accuracy": accuracy,
    }
