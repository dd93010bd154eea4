"""File endpoints in OpenAI's format: datasets, and the metrics of succeeded jobs."""

from __future__ import annotations

import base64
import heapq
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import StreamingResponse

from api.dependencies import ServiceOf, UploadsOf
from api.errors import error_locations
from api.http.idempotency import Idempotency, IdempotencyOf
from api.http.multipart import MEDIA_TYPE as MULTIPART
from api.http.multipart import Form
from api.http.uploads import display_name
from api.v1.ids import (
    dataset_of_file,
    file_errors,
    file_not_found,
    file_of_dataset,
    job_of_results,
    results_of_job,
    sort_key,
)
from api.v1.rendering import seconds
from api.v1.routes import After, FileId, openai_errors
from api.v1.schemas import DeletedFile, File, ListPage, page_of
from qlora_service.actions.service import Service
from qlora_service.domain.datasets import Dataset
from qlora_service.domain.jobs import Job, JobStatus
from qlora_service.domain.metrics import metrics_csv
from qlora_service.domain.row_warnings import warning_texts
from qlora_service.errors import Conflict, InvalidDataset, InvalidRequest

router = APIRouter(prefix="/files", tags=["openai files"])

PURPOSE = "fine-tune"
MAX_DETAILS = 5
"""Kinds of warnings in `status_details`"""
_EXPIRES_AFTER = ("expires_after[anchor]", "expires_after[seconds]")
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "required": ["purpose", "file"],
                    "additionalProperties": False,
                    "properties": {
                        "purpose": {"type": "string", "enum": [PURPOSE]},
                        "file": {"type": "string", "format": "binary"},
                    },
                }
            }
        },
    }
}
_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The uploaded bytes of a dataset, or the CSV of results encoded in base64.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post("", summary="Upload a file", responses=openai_errors(409, 413), openapi_extra=_FORM)
async def create_file(request: Request, service: ServiceOf, uploads: UploadsOf, idempotency: IdempotencyOf) -> File:
    """Check a dataset and store it, in any format that POST /datasets accepts.

    Unusable rows are left out; `status_details` reports them by reason. A file without a usable row is refused with its
    findings, and nothing is stored. Uploading the same bytes again returns the same file.
    """
    async with uploads.receive_form(request, files=["file"], fields=["purpose", *_EXPIRES_AFTER]) as form:
        return await run_in_threadpool(_create, service, idempotency, form)


@router.get("", summary="List files", responses=openai_errors())
def list_files(
    service: ServiceOf,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000, description="Maximum number of items on a page.")] = 10_000,
    order: Annotated[
        Literal["asc", "desc"], Query(description="`asc` for oldest first, `desc` for newest first.")
    ] = "desc",
    purpose: Annotated[str | None, Query(max_length=64, description="List only files with this purpose.")] = None,
) -> ListPage[File]:
    """Datasets and results, sorted by age. The results of a job are sorted by the job's creation time."""
    cursor = None if after is None else sort_key(after)
    if after is not None and cursor is None:
        raise InvalidRequest(f"{after!r} is not a file id: send the last id of the previous page", location="after")
    ascending = order == "asc"
    files: list[list[File]] = []
    if purpose in (None, PURPOSE):
        datasets = service.datasets.list_datasets(**_page_start("ds", cursor, ascending), limit=limit + 1)
        files.append([file_of(dataset) for dataset in datasets])
    if purpose in (None, "fine-tune-results"):
        start = _page_start("job", cursor, ascending)
        jobs = service.jobs.list_jobs(status=JobStatus.SUCCEEDED, **start, limit=limit + 1)
        files.append([_results_file(service, job) for job in jobs])
    merged = heapq.merge(*files, key=lambda file: sort_key(file.id) or "", reverse=not ascending)
    return page_of(list(merged), limit)


@router.get("/{file_id}", summary="Look at a file", responses=openai_errors(404))
def get_file(file_id: FileId, service: ServiceOf) -> File:
    """Name and size of the file, and the rows that are left out or not trained as one would expect."""
    source = _source_of(service, file_id)
    return _results_file(service, source) if isinstance(source, Job) else file_of(source)


@router.get(
    "/{file_id}/content",
    summary="Download a file",
    response_class=Response,
    responses=_CONTENT | openai_errors(404),
)
def get_content(file_id: FileId, service: ServiceOf) -> Response:
    """The uploaded bytes of a dataset, or the results of a job encoded in base64 as by OpenAI's API.

    GET /jobs/{job_id}/metrics.csv returns the results as plain CSV.
    """
    source = _source_of(service, file_id)
    if isinstance(source, Job):
        return Response(base64.b64encode(_results_csv(service, source)), media_type="application/octet-stream")
    headers = {"Content-Length": str(source.report.bytes), "X-Content-Type-Options": "nosniff"}
    return StreamingResponse(service.datasets.read(source), headers=headers, media_type="application/octet-stream")


@router.delete("/{file_id}", summary="Delete a file", responses=openai_errors(404, 409))
def delete_file(file_id: FileId, service: ServiceOf, idempotency: IdempotencyOf) -> DeletedFile:
    """Delete a dataset, unless an unfinished job needs it. Results cannot be deleted: they are part of their job."""
    dataset_id = dataset_of_file(file_id)
    if dataset_id is None:
        _source_of(service, file_id)
        raise Conflict(f"{file_id} holds the metrics of its job: it exists as long as the job does", location="file_id")
    with file_errors(file_id):
        return _deleted(service.datasets.delete(dataset_id, once=idempotency.once(_deleted)))


def file_of(dataset: Dataset) -> File:
    """The file that represents a dataset."""
    report = dataset.report
    texts = warning_texts(report.finding_kinds, report.warnings)
    if len(texts) > MAX_DETAILS:
        texts[MAX_DETAILS:] = [f"… and {len(texts) - MAX_DETAILS} more kinds: GET /datasets/{dataset.id}"]
    return File(
        id=file_of_dataset(dataset.id),
        bytes=report.bytes,
        created_at=seconds(dataset.created_at),
        filename=dataset.filename or f"{dataset.id}.{report.container}",
        purpose=PURPOSE,
        status_details="; ".join(texts) or None,
    )


def expiry_not_supported() -> InvalidRequest:
    return InvalidRequest(
        "files are stored until they are deleted: leave expires_after out, and DELETE the file when it is no longer "
        "needed",
        location="expires_after",
    )


def _create(service: Service, idempotency: Idempotency, form: Form) -> File:
    """Raises: InvalidRequest, InvalidDataset."""
    for field in _EXPIRES_AFTER:
        if field in form.fields:
            raise expiry_not_supported()
    purpose, file = form.text("purpose"), form.files.get("file")
    if purpose != PURPOSE:
        raise InvalidRequest(
            f"the purpose is {(purpose or '')[:100]!r}: this service accepts training files only, with the purpose "
            f"{PURPOSE!r}",
            location="purpose",
        )
    if file is None:
        raise InvalidRequest("the form has no part `file`: send the dataset in it", location="file")
    once = idempotency.once(file_of, content=idempotency.form_content(form, {"purpose": purpose}))
    with error_locations({InvalidDataset: "file"}):
        return file_of(service.datasets.upload(file.path, filename=display_name(file.filename), once=once))


def _page_start(kind: str, cursor: str | None, ascending: bool) -> dict[str, Any]:
    """Arguments that list datasets or jobs from the cursor, a file's sort key, on."""
    last_id = None if cursor is None else f"{kind}_{cursor}"
    return {"after" if ascending else "before": last_id, "oldest_first": ascending}


def _source_of(service: Service, file_id: str) -> Dataset | Job:
    """The dataset that the file represents, or the job whose results it holds. Raises: NotFound."""
    dataset_id, job_id = dataset_of_file(file_id), job_of_results(file_id)
    with file_errors(file_id):
        if dataset_id is not None:
            return service.datasets.get(dataset_id)
        if job_id is not None and (job := service.jobs.get(job_id)).status is JobStatus.SUCCEEDED:
            return job
    raise file_not_found(file_id)


def _results_csv(service: Service, job: Job) -> bytes:
    return metrics_csv(service.jobs.metrics(job.id), holds_out=job.spec.validation.holds_out).encode()


def _results_file(service: Service, job: Job) -> File:
    size = (job.result or {}).get("results_bytes")  # counted by the trainer, so that a list need not build each CSV
    return File(
        id=results_of_job(job.id),
        bytes=len(_results_csv(service, job)) if size is None else size,
        created_at=seconds(job.finished_at or job.created_at),
        filename="step_metrics.csv",
        purpose="fine-tune-results",
        status_details=None,
    )


def _deleted(dataset: Dataset) -> DeletedFile:
    return DeletedFile(id=file_of_dataset(dataset.id))
