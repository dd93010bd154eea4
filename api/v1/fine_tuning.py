"""Fine-tuning endpoints in OpenAI's format. /jobs and /v1/fine_tuning/jobs list the same jobs."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request

from api.dependencies import Limit, ServiceOf
from api.http.idempotency import IdempotencyOf
from api.v1.rendering import EVENT_TYPES, fine_tuning_checkpoints, fine_tuning_event, fine_tuning_job
from api.v1.requests import CreateFineTuningJob
from api.v1.routes import After, FineTuningJobId, JsonRoute, openai_errors
from api.v1.schemas import FineTuningCheckpoint, FineTuningEvent, FineTuningJob, ListPage, page_of
from api.v1.translation import in_request, to_spec
from qlora_service.actions.jobs import Submission
from qlora_service.domain.clock import utc_now
from qlora_service.domain.jobs import Job
from qlora_service.errors import InvalidRequest

router = APIRouter(prefix="/fine_tuning/jobs", tags=["openai fine-tuning"], route_class=JsonRoute)

_CHANGE_ERRORS = openai_errors(404, 409)
_METADATA_KEY = re.compile(r"metadata\[(.+)\]", re.DOTALL)
_METADATA_FILTER: dict[str, Any] = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "required": False,
            "style": "deepObject",
            "explode": True,
            "description": "`metadata[key]=value` lists only jobs with all of these pairs, `metadata=null` only jobs "
            "without metadata.",
            "schema": {
                "type": "object",
                "propertyNames": {"minLength": 1},
                "additionalProperties": {"type": "string"},
            },
        }
    ]
}


@router.post("", summary="Create a fine-tuning job", responses=openai_errors(404, 409, 413, 415))
def create_job(body: CreateFineTuningJob, service: ServiceOf, idempotency: IdempotencyOf) -> FineTuningJob:
    """Check rows, lengths, model and fields, then queue a job. No job has the status `validating_files`."""
    spec, force = to_spec(body, service)
    once = idempotency.once(_submitted, content=body.model_dump(mode="json", exclude_unset=True))
    with in_request(body):
        return _submitted(service.jobs.submit(spec, force=force, once=once))


@router.get("", summary="List fine-tuning jobs", responses=openai_errors(), openapi_extra=_METADATA_FILTER)
def list_jobs(request: Request, service: ServiceOf, after: After = None, limit: Limit = 20) -> ListPage[FineTuningJob]:
    """The project's jobs, newest first."""
    jobs = service.jobs.list_jobs(metadata=_metadata_filter(request), before=after, limit=limit + 1)
    positions, ends_in_s, now = service.jobs.queue_positions(jobs), service.jobs.seconds_to_end(jobs), utc_now()
    return page_of([fine_tuning_job(job, positions.get(job.id), now, ends_in_s.get(job.id)) for job in jobs], limit)


@router.get("/{fine_tuning_job_id}", summary="Look at a fine-tuning job", responses=openai_errors(404))
def get_job(fine_tuning_job_id: FineTuningJobId, service: ServiceOf) -> FineTuningJob:
    """Status and times of a job; `qlora` holds the job in the format of GET /jobs/{id}."""
    job = service.jobs.get(fine_tuning_job_id)
    ends_in_s = service.jobs.seconds_to_end([job]).get(job.id)
    return fine_tuning_job(job, service.jobs.queue_position(job), utc_now(), ends_in_s)


@router.post("/{fine_tuning_job_id}/cancel", summary="Cancel a fine-tuning job", responses=_CHANGE_ERRORS)
def cancel_job(fine_tuning_job_id: FineTuningJobId, service: ServiceOf, idempotency: IdempotencyOf) -> FineTuningJob:
    """Cancel a queued, running or paused job. A running job ends at its next step."""
    return _without_position(service.jobs.cancel(fine_tuning_job_id, once=idempotency.once(_without_position)))


@router.post("/{fine_tuning_job_id}/pause", summary="Pause a fine-tuning job", responses=_CHANGE_ERRORS)
def pause_job(fine_tuning_job_id: FineTuningJobId, service: ServiceOf, idempotency: IdempotencyOf) -> FineTuningJob:
    """Pause a queued or running job. A running job stops at its next step, after saving a checkpoint of it."""
    return _without_position(service.jobs.pause(fine_tuning_job_id, once=idempotency.once(_without_position)))


@router.post("/{fine_tuning_job_id}/resume", summary="Resume a fine-tuning job", responses=_CHANGE_ERRORS)
def resume_job(fine_tuning_job_id: FineTuningJobId, service: ServiceOf, idempotency: IdempotencyOf) -> FineTuningJob:
    """Return a paused job to the queue. It resumes from its last checkpoint."""
    return _submitted(service.jobs.resume(fine_tuning_job_id, once=idempotency.once(_submitted)))


@router.get("/{fine_tuning_job_id}/events", summary="List a job's events", responses=openai_errors(404))
def list_events(
    fine_tuning_job_id: FineTuningJobId,
    service: ServiceOf,
    after: Annotated[
        str | None, Query(pattern=r"^ftevent-[0-9]{1,18}$", description="Cursor: the last id of the previous page.")
    ] = None,
    limit: Limit = 20,
) -> ListPage[FineTuningEvent]:
    """The events of a job, newest first. GET /jobs/{id}/events streams them as they occur."""
    job = service.jobs.get(fine_tuning_job_id)
    before = None if after is None else int(after.removeprefix("ftevent-"))
    events = service.jobs.events_before(job.id, before, types=EVENT_TYPES, limit=limit + 1)
    return page_of([fine_tuning_event(event, job) for event in events], limit)


@router.get("/{fine_tuning_job_id}/checkpoints", summary="List a job's checkpoints", responses=openai_errors(404))
def list_checkpoints(
    fine_tuning_job_id: FineTuningJobId, service: ServiceOf, after: After = None, limit: Limit = 10
) -> ListPage[FineTuningCheckpoint]:
    """The published adapter of a succeeded job, or the checkpoint that an unfinished job resumes from.

    Only the published adapter can be used as a model.
    """
    job = service.jobs.get(fine_tuning_job_id)
    checkpoints = fine_tuning_checkpoints(job, service.jobs.events(job.id))
    return page_of([checkpoint for checkpoint in checkpoints if after != checkpoint.id], limit)


def _metadata_filter(request: Request) -> dict[str, str] | None:
    """The pairs to filter by: empty for `metadata=null`, None without a filter. Raises: InvalidRequest."""
    pairs: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        match = _METADATA_KEY.fullmatch(name)
        if match and "\0" not in name + value and match[1] not in pairs:
            pairs[match[1]] = value
        elif name.startswith("metadata") and not (name == "metadata" and value == "null"):
            raise InvalidRequest(
                f"{name[:100]!r} is not a valid filter: use metadata[key]=value, each key once, or metadata=null",
                location="metadata",
            )
    if "metadata" in request.query_params:
        if pairs:
            raise InvalidRequest("use metadata=null or metadata[key]=value, not both", location="metadata")
        return {}
    return pairs or None


def _submitted(submission: Submission) -> FineTuningJob:
    return fine_tuning_job(submission.job, submission.queue_position, utc_now())


def _without_position(job: Job) -> FineTuningJob:
    return fine_tuning_job(job, None, utc_now())
