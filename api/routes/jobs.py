"""Jobs: submit, follow, pause, resume, cancel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from api.dependencies import After, JobId, Limit, ServiceOf, UploadsOf
from api.errors import SPEC_LOCATIONS, UnsupportedMediaType, error_locations, error_responses
from api.force import take_force
from api.http.idempotency import Idempotency, IdempotencyOf
from api.http.json_body import parse_body
from api.http.multipart import MEDIA_TYPE as MULTIPART
from api.http.multipart import Form, is_multipart
from api.http.uploads import display_name, receive_bytes
from api.schemas import Job, Metrics, Page
from qlora_service.actions.jobs import Submission
from qlora_service.actions.service import Service
from qlora_service.domain.jobs import Job as DomainJob
from qlora_service.domain.jobs import JobStatus
from qlora_service.domain.metrics import metrics_csv
from qlora_service.errors import Finding, InvalidDataset, InvalidRequest
from qlora_service.specs import parse_spec

router = APIRouter(prefix="/jobs", tags=["jobs"])


MAX_STEP = 2**31 - 1

_CHANGE_ERRORS = error_responses(404, 409, 422)

_TABLE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The table.", "content": {"text/csv": {"schema": {"type": "string"}}}}
}
_SPEC_SCHEMA = {"$ref": "#/components/schemas/JobRequest"}
_JOB_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": _SPEC_SCHEMA,
                "examples": {
                    "stored dataset": {
                        "value": {
                            "base_model": "SmolLM2-135M-Instruct",
                            "dataset": {"id": "ds_019a9c2f8d31c4e55f0a7b"},
                            "training": {"max_steps": 40, "learning_rate": 0.0002},
                        }
                    },
                    "inline rows": {
                        "value": {
                            "base_model": "SmolLM2-135M-Instruct",
                            "dataset": {"rows": [{"prompt": "2 + 2 =", "completion": "4"}]},
                            "validation": {"fraction": 0},
                        }
                    },
                },
            },
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "required": ["config"],
                    "properties": {
                        "dataset": {
                            "type": "string",
                            "format": "binary",
                            "description": "The dataset file; `config.dataset` may name its container and shape.",
                        },
                        "config": _SPEC_SCHEMA,
                    },
                },
                "encoding": {"config": {"contentType": "application/json"}},
            },
        },
    }
}


@router.post(
    "",
    status_code=201,
    summary="Submit a job",
    responses=error_responses(404, 409, 413, 415, 422, 429),
    openapi_extra=_JOB_BODY,
)
async def create_job(
    request: Request, response: Response, service: ServiceOf, uploads: UploadsOf, idempotency: IdempotencyOf
) -> Job:
    """Queue a fine-tuning job on a stored dataset, on inline rows, or on a file in the same request.

    Send JSON (`dataset` holds `id` or `rows`), or a form with the parts `dataset` (a file) and `config` (JSON).
    A job that would certainly fail is rejected, and neither the job nor its dataset is stored. Without `force`, this
    includes a job that does not fit into the device's memory; `error.details` then has its plan.
    """
    content_type = request.headers.get("content-type", "")
    if is_multipart(content_type):
        async with uploads.receive_form(request, files=["dataset"], fields=["config"]) as form:
            submission = await run_in_threadpool(_submit_form, service, idempotency, form)
    elif content_type.partition(";")[0].strip().lower() == "application/json":
        submission = await run_in_threadpool(_submit_json, service, idempotency, await receive_bytes(request))
    else:
        raise UnsupportedMediaType(
            f"Content-Type is {content_type[:100]!r}: send application/json, or {MULTIPART} with the parts "
            "`dataset` and `config`",
            location="content-type",
        )
    response.headers["Location"] = _location(submission)
    return _submitted(submission)


@router.get("", summary="List jobs", responses=error_responses(422))
def list_jobs(
    service: ServiceOf,
    status: Annotated[JobStatus | None, Query(description="Only jobs with this status.")] = None,
    base_model: Annotated[str | None, Query(description="Only jobs on this base model.")] = None,
    after: After = None,
    limit: Limit = 20,
) -> Page[Job]:
    """Jobs, newest first."""
    jobs = service.jobs.list_jobs(status=status, base_model=base_model, before=after, limit=limit + 1)
    positions = service.jobs.queue_positions(jobs)
    data = [Job.of(job, positions.get(job.id)) for job in jobs[:limit]]
    return Page(data=data, next=data[-1].id if len(jobs) > limit else None)


@router.get("/{job_id}", summary="Look at a job", responses=error_responses(404, 422))
def get_job(job_id: JobId, service: ServiceOf) -> Job:
    """Status, progress, estimated time left and latest metrics; the error, if the job failed."""
    job = service.jobs.get(job_id)
    return Job.of(job, service.jobs.queue_position(job))


@router.post("/{job_id}/cancel", summary="Cancel a job", responses=_CHANGE_ERRORS)
def cancel_job(job_id: JobId, service: ServiceOf, idempotency: IdempotencyOf) -> Job:
    """Cancel a job: a queued or paused job at once, a running job at its next step (`stop_request`).

    Cancelling a job twice has no further effect.
    """
    return _not_queued(service.jobs.cancel(job_id, once=idempotency.once(_not_queued)))


@router.post("/{job_id}/pause", summary="Pause a job", responses=_CHANGE_ERRORS)
def pause_job(job_id: JobId, service: ServiceOf, idempotency: IdempotencyOf) -> Job:
    """Pause a job: a queued job at once, a running job after its next step (`stop_request`), which is saved.

    Until `resume`, the GPU is free for other jobs. Pausing a job twice has no further effect.
    """
    return _not_queued(service.jobs.pause(job_id, once=idempotency.once(_not_queued)))


@router.post("/{job_id}/resume", summary="Resume a job", responses=_CHANGE_ERRORS)
def resume_job(job_id: JobId, service: ServiceOf, idempotency: IdempotencyOf) -> Job:
    """Put a paused job back into the queue; it resumes from its last saved step (`checkpoint_step`).

    A pause that a running job has not reached yet is withdrawn. Resuming a job twice has no further effect.
    """
    return _submitted(service.jobs.resume(job_id, once=idempotency.once(_submitted)))


@router.get("/{job_id}/metrics", summary="All metrics of a job", responses=error_responses(404, 422))
def get_metrics(
    job_id: JobId,
    service: ServiceOf,
    after: Annotated[int | None, Query(ge=0, le=MAX_STEP, description="Only records of steps after this one.")] = None,
    limit: Annotated[int | None, Query(ge=1, description="Maximum number of steps in the page; default: all.")] = None,
) -> Metrics:
    """One record per step and per evaluation, in order of steps.

    An interrupted job resumes from its last saved step: `attempt` is the attempt that computed the step.
    """
    records = [record for record in service.jobs.metrics(job_id) if after is None or record["step"] > after]
    steps = list(dict.fromkeys(record["step"] for record in records))
    if limit is None or len(steps) <= limit:
        return Metrics(data=records, next=None)
    # Records of a step stay on one page, because the cursor of the next page is the number of a step.
    last_step = steps[limit - 1]
    return Metrics(data=[record for record in records if record["step"] <= last_step], next=last_step)


@router.get(
    "/{job_id}/metrics.csv",
    summary="Metrics as a table",
    response_class=Response,
    responses=_TABLE | error_responses(404, 422),
)
def get_metrics_csv(job_id: JobId, service: ServiceOf) -> Response:
    """One line per measured step, with the columns of the result files of OpenAI's API."""
    holds_out = service.jobs.get(job_id).spec.validation.holds_out
    return Response(metrics_csv(service.jobs.metrics(job_id), holds_out=holds_out), media_type="text/csv")


def _submit_json(service: Service, idempotency: Idempotency, body: bytes) -> Submission:
    document = parse_body(body)
    return _submit(service, idempotency, document, {"json": document})


def _submit_form(service: Service, idempotency: Idempotency, form: Form) -> Submission:
    config = form.fields.get("config")
    if config is None:
        raise InvalidRequest("the form has no part `config`: send the job's JSON in it", location="config")
    document, file = parse_body(config, "config"), form.files.get("dataset")
    content = idempotency.form_content(form, {"config": document})
    if file is None:
        return _submit(service, idempotency, document, content)
    return _submit(service, idempotency, document, content, file.path, display_name(file.filename))


def _submit(
    service: Service,
    idempotency: Idempotency,
    document: Any,
    content: object,
    path: Path | None = None,
    filename: str | None = None,
) -> Submission:
    document, force = take_force(document)
    spec = parse_spec(document)
    once = idempotency.once(_submitted, status=201, content=content, location=_location)
    with error_locations(SPEC_LOCATIONS), _row_error_locations(inline=spec.dataset.rows is not None):
        return service.jobs.submit(spec, path, filename, force=force, once=once)


@contextmanager
def _row_error_locations(*, inline: bool) -> Iterator[None]:
    """Gives findings in inline rows their location in the body of the request."""
    try:
        yield
    except InvalidDataset as error:
        if inline:
            error.findings = tuple(_in_body(finding) for finding in error.findings)
        raise


def _in_body(finding: Finding) -> Finding:
    """The finding with a pointer into the body in place of line and byte offset: there is no file they refer to."""
    if finding.line is None:
        return finding
    return Finding(finding.reason, f"/dataset/rows/{finding.line - 1}{finding.pointer}")


# The response bodies below use only the result of the transaction, because the state may change after it.


def _submitted(submission: Submission) -> Job:
    return Job.of(submission.job, submission.queue_position)


def _location(submission: Submission) -> str:
    return f"/jobs/{submission.job.id}"


def _not_queued(job: DomainJob) -> Job:
    return Job.of(job, queue_position=None)
