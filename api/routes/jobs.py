"""Jobs: submit, follow, cancel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from api.dependencies import After, JobId, Limit, ServiceOf, UploadsOf
from api.errors import UnsupportedMediaType, error_responses, located
from api.json_body import parse_body
from api.multipart import MEDIA_TYPE as MULTIPART
from api.multipart import FilePart, is_multipart
from api.schemas import Job, Listing, Page, SubmittedJob, job_fields
from api.uploads import display_name, receive_bytes
from qlora_service.errors import Finding, InvalidDataset, InvalidModel, InvalidRequest, QLoRAError
from qlora_service.jobs import Job as DomainJob
from qlora_service.jobs import JobStatus
from qlora_service.service import Service
from qlora_service.specs import parse_spec

router = APIRouter(prefix="/jobs", tags=["jobs"])

# Where in the spec the errors belong that do not say so themselves.
_PLACES: dict[type[QLoRAError], str] = {InvalidModel: "/base_model", InvalidDataset: "/dataset"}

_SPEC_SCHEMA = {"$ref": "#/components/schemas/JobSpec"}
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
                            "dataset": {"rows": [{"prompt": "2 + 2 =", "completion": " 4"}]},
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
                            "description": "The dataset's file; `config.dataset` may name its container and shape.",
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
    responses=error_responses(400, 404, 413, 415, 422),
    openapi_extra=_JOB_BODY,
)
async def create_job(request: Request, response: Response, service: ServiceOf, uploads: UploadsOf) -> SubmittedJob:
    """Queue a fine-tuning job on a stored dataset, on rows sent inline, or on a file sent along.

    As JSON (`dataset` holds `id` or `rows`), or as a form with the parts `dataset` (a file) and `config` (JSON).
    What can be known to fail is refused here, and then neither the job nor its dataset is stored.
    """
    content_type = request.headers.get("content-type", "")
    if is_multipart(content_type):
        async with uploads.receive_form(request, files=["dataset"], fields=["config"]) as form:
            config = form.fields.get("config")
            if config is None:
                raise InvalidRequest("the form has no part `config`: send the job's JSON in it", location="config")
            job = await run_in_threadpool(_submit, service, config, form.files.get("dataset"))
    elif content_type.partition(";")[0].strip().lower() == "application/json":
        job = await run_in_threadpool(_submit, service, await receive_bytes(request))
    else:
        raise UnsupportedMediaType(
            f"Content-Type is {content_type[:100]!r}: send application/json, or {MULTIPART} with the parts "
            "`dataset` and `config`",
            location="content-type",
        )
    response.headers["Location"] = f"/jobs/{job.id}"
    return job


@router.get("", summary="List jobs", responses=error_responses(422))
def list_jobs(
    service: ServiceOf,
    status: Annotated[JobStatus | None, Query(description="Only jobs of this status.")] = None,
    base_model: Annotated[str | None, Query(description="Only jobs on this base model.")] = None,
    after: After = None,
    limit: Limit = 20,
) -> Page[Job]:
    """Jobs, newest first."""
    found = service.list_jobs(status=status, base_model=base_model, before=after, limit=limit + 1)
    data = [_view(service, job) for job in found[:limit]]
    return Page(data=data, next=data[-1].id if len(found) > limit else None)


@router.get("/{job_id}", summary="Look at a job", responses=error_responses(404, 422))
def get_job(job_id: JobId, service: ServiceOf) -> Job:
    """Status, progress, time to go, the latest metrics; what went wrong, if it failed."""
    return _view(service, service.get_job(job_id))


@router.post("/{job_id}/cancel", summary="Cancel a job", responses=error_responses(404, 409, 422))
def cancel_job(job_id: JobId, service: ServiceOf) -> Job:
    """A queued job ends at once, a running one at its next step (`cancel_requested`). Asking twice does no harm."""
    return _view(service, service.cancel(job_id))


@router.get("/{job_id}/metrics", summary="All metrics of a job", responses=error_responses(404, 422))
def get_metrics(job_id: JobId, service: ServiceOf) -> Listing[dict[str, Any]]:
    """One record per step and per evaluation of the latest attempt, oldest first."""
    return Listing(data=service.job_metrics(job_id))


def _submit(service: Service, config: bytes | bytearray, file: FilePart | None = None) -> SubmittedJob:
    spec = parse_spec(parse_body(config))
    with located(_PLACES), _rows_located(inline=spec.dataset.rows is not None):
        if file is None:
            submission = service.submit(spec)
        else:
            submission = service.submit(spec, file.path, display_name(file.filename))
    fields = job_fields(submission.job, service.queue_position(submission.job))
    return SubmittedJob.model_validate(fields | {"warnings": list(submission.warnings)})


@contextmanager
def _rows_located(*, inline: bool) -> Iterator[None]:
    """Findings on rows that came inline leave with their place in the request's body."""
    try:
        yield
    except InvalidDataset as error:
        if inline:
            error.findings = tuple(_in_body(finding) for finding in error.findings)
        raise


def _in_body(finding: Finding) -> Finding:
    """A line and an offset would be of a file that nobody sent."""
    if finding.line is None:
        return finding
    return Finding(finding.reason, f"/dataset/rows/{finding.line - 1}{finding.pointer}")


def _view(service: Service, job: DomainJob) -> Job:
    return Job.of(job, service.queue_position(job))
