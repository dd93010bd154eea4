"""Fine-tuning jobs on OpenAI's wire. They are the jobs of /jobs: listed here and there, wherever posted."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request

from api.dependencies import ServiceOf
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
            "description": "`metadata[key]=value`: only jobs with all of these pairs; `metadata=null`: only jobs "
            "without any.",
            "schema": {
                "type": "object",
                "propertyNames": {"minLength": 1},
                "additionalProperties": {"type": "string"},
            },
        }
    ]
}

PageLimit = Annotated[int, Query(ge=1, le=100, description="Most items of a page.")]


@router.post("", summary="Create a fine-tuning job", responses=openai_errors(404, 409, 413, 415))
def create_job(body: CreateFineTuningJob, service: ServiceOf, idempotency: IdempotencyOf) -> FineTuningJob:
    """Queue a job. Rows, lengths, model and fields are checked now: `validating_files` is a status no job has."""
    spec, force = to_spec(body, service)
    once = idempotency.once(_submitted, content=body.model_dump(mode="json", exclude_unset=True))
    with in_request(body):
        return _submitted(service.jobs.submit(spec, force=force, once=once))


@router.get("", summary="List fine-tuning jobs", responses=openai_errors(), openapi_extra=_METADATA_FILTER)
def list_jobs(
    request: Request, service: ServiceOf, after: After = None, limit: PageLimit = 20
) -> ListPage[FineTuningJob]:
    """Jobs, newest first."""
    found = service.jobs.list_jobs(metadata=_metadata_filter(request), before=after, limit=limit + 1)
    positions, ends, now = service.jobs.queue_positions(found), service.jobs.seconds_to_end(found), utc_now()
    return page_of([fine_tuning_job(job, positions.get(job.id), now, ends.get(job.id)) for job in found], limit)


@router.get("/{fine_tuning_job_id}", summary="Look at a fine-tuning job", responses=openai_errors(404))
def get_job(fine_tuning_job_id: FineTuningJobId, service: ServiceOf) -> FineTuningJob:
    """Status and times; under `qlora` all that GET /jobs/{id} shows."""
    job = service.jobs.get(fine_tuning_job_id)
    ends_in_s = service.jobs.seconds_to_end([job]).get(job.id)
    return fine_tuning_job(job, service.jobs.queue_position(job), utc_now(), ends_in_s)


@router.post("/{fine_tuning_job_id}/cancel", summary="Cancel a fine-tuning job", responses=_CHANGE_ERRORS)
def cancel_job(fine_tuning_job_id: FineTuningJobId, service: ServiceOf, idempotency: IdempotencyOf) -> FineTuningJob:
    """A running job ends at its next step."""
    return _not_queued(service.jobs.cancel(fine_tuning_job_id, once=idempotency.once(_not_queued)))


@router.post("/{fine_tuning_job_id}/pause", summary="Pause a fine-tuning job", responses=_CHANGE_ERRORS)
def pause_job(fine_tuning_job_id: FineTuningJobId, service: ServiceOf, idempotency: IdempotencyOf) -> FineTuningJob:
    """A running job stops at its next step, with that step saved."""
    return _not_queued(service.jobs.pause(fine_tuning_job_id, once=idempotency.once(_not_queued)))


@router.post("/{fine_tuning_job_id}/resume", summary="Resume a fine-tuning job", responses=_CHANGE_ERRORS)
def resume_job(fine_tuning_job_id: FineTuningJobId, service: ServiceOf, idempotency: IdempotencyOf) -> FineTuningJob:
    """A paused job goes back into the queue, and on from its last saved step."""
    return _submitted(service.jobs.resume(fine_tuning_job_id, once=idempotency.once(_submitted)))


@router.get("/{fine_tuning_job_id}/events", summary="List a job's events", responses=openai_errors(404))
def list_events(
    fine_tuning_job_id: FineTuningJobId,
    service: ServiceOf,
    after: Annotated[
        str | None, Query(pattern=r"^ftevent-[0-9]{1,18}$", description="The last id of the page before.")
    ] = None,
    limit: PageLimit = 20,
) -> ListPage[FineTuningEvent]:
    """Events, newest first. GET /jobs/{id}/events streams them as they happen."""
    job = service.jobs.get(fine_tuning_job_id)
    before = None if after is None else int(after.removeprefix("ftevent-"))
    events = service.jobs.events_before(job.id, before, types=EVENT_TYPES, limit=limit + 1)
    return page_of([fine_tuning_event(event, job) for event in events], limit)


@router.get("/{fine_tuning_job_id}/checkpoints", summary="List a job's checkpoints", responses=openai_errors(404))
def list_checkpoints(
    fine_tuning_job_id: FineTuningJobId, service: ServiceOf, after: After = None, limit: PageLimit = 10
) -> ListPage[FineTuningCheckpoint]:
    """What exists: of a succeeded job the adapter it published, of one under way the step it would go on from.

    Only a published one is a model that can be used.
    """
    job = service.jobs.get(fine_tuning_job_id)
    checkpoints = fine_tuning_checkpoints(job, service.jobs.events(job.id))
    return page_of([checkpoint for checkpoint in checkpoints if after != checkpoint.id], limit)


def _metadata_filter(request: Request) -> dict[str, str] | None:
    """The pairs asked for; none at all for `metadata=null`, and None for no filter. Raises: InvalidRequest."""
    wanted: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        match = _METADATA_KEY.fullmatch(name)
        if match and "\0" not in name + value and match[1] not in wanted:
            wanted[match[1]] = value
        elif name.startswith("metadata") and not (name == "metadata" and value == "null"):
            raise InvalidRequest(
                f"{name[:100]!r} cannot be used: filter with metadata[key]=value, each key once, or with metadata=null",
                location="metadata",
            )
    if "metadata" in request.query_params:
        if wanted:
            raise InvalidRequest("give metadata=null or metadata[key]=value, not both", location="metadata")
        return {}
    return wanted or None


def _submitted(submission: Submission) -> FineTuningJob:
    return fine_tuning_job(submission.job, submission.queue_position, utc_now())


def _not_queued(job: Job) -> FineTuningJob:
    return fine_tuning_job(job, None, utc_now())
