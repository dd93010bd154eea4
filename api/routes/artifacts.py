"""Artifacts of jobs: list, download, download all as a zip."""

from __future__ import annotations

import mimetypes
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Response
from starlette.requests import Request
from starlette.responses import StreamingResponse

from api.dependencies import JobId, ServiceOf
from api.errors import error_responses
from api.http.archive import stream_zip
from api.http.ranges import etag_of, is_unmodified, requested_range
from api.schemas import Artifact, Listing

router = APIRouter(prefix="/jobs", tags=["artifacts"])

_MEDIA_TYPES = {
    ".jsonl": "application/jsonl",
    ".md": "text/markdown; charset=utf-8",
    ".jinja": "text/plain; charset=utf-8",
}
_BYTES = {"schema": {"type": "string", "format": "binary"}}
_FILE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file.", "content": {"application/octet-stream": _BYTES}},
    206: {"description": "The requested range of bytes.", "content": {"application/octet-stream": _BYTES}},
    304: {"description": "The client's copy is current."},
}
_ZIP_RESPONSE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The zip.", "content": {"application/zip": _BYTES}}
}


@router.get("/{job_id}/artifacts", summary="List artifacts", responses=error_responses(404, 409, 422))
def list_artifacts(job_id: JobId, service: ServiceOf) -> Listing[Artifact]:
    """The files that a job published, with sizes and SHA-256.

    Of a succeeded job, its adapter. Of a job that failed because training losses or gradients were not finite, the
    adapter of the last finite step.
    """
    return Listing(data=[Artifact.of(job_id, artifact.file) for artifact in service.artifacts.list_files(job_id)])


@router.head("/{job_id}/artifacts/{name}", include_in_schema=False)
@router.get(
    "/{job_id}/artifacts/{name}",
    summary="Download an artifact",
    response_class=Response,
    responses=_FILE_RESPONSES | error_responses(404, 409, 416, 422),
)
def get_artifact(
    request: Request,
    job_id: JobId,
    name: Annotated[str, Path(description="Name of the file.", examples=["adapter_model.safetensors"])],
    service: ServiceOf,
    if_none_match: Annotated[str | None, Header(description="ETags: 304 if the file's is one of them.")] = None,
    range: Annotated[str | None, Header(description="One range of bytes, to resume a download.")] = None,
    if_range: Annotated[str | None, Header(description="An ETag: Range applies only if it is the file's.")] = None,
) -> Response:
    """The bytes of the file. The ETag is the SHA-256 of the whole file: compare it after a download."""
    artifact = service.artifacts.get(job_id, name)
    file, etag = artifact.file, etag_of(artifact.file.sha256)
    headers = {"ETag": etag, "Accept-Ranges": "bytes", "X-Content-Type-Options": "nosniff"}
    if is_unmodified(if_none_match, etag):
        return Response(status_code=304, headers=headers)
    part = requested_range(range, if_range, etag, file.bytes)
    start, end = part or (0, file.bytes)
    headers |= {"Content-Length": str(end - start), "Content-Disposition": _attachment(file.name)}
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.bytes}"
    status = 200 if part is None else 206
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=_media_type(name))
    chunks = service.artifacts.read(artifact, start, end)
    return StreamingResponse(chunks, status, headers, _media_type(name))


@router.get(
    "/{job_id}/adapter.zip",
    summary="Download everything as a zip",
    response_class=StreamingResponse,
    responses=_ZIP_RESPONSE | error_responses(404, 409, 422),
)
def get_adapter_zip(job_id: JobId, service: ServiceOf) -> StreamingResponse:
    """All artifacts of a job as one zip, streamed. The bytes are the same for every download."""
    artifacts = {artifact.file.name: artifact for artifact in service.artifacts.list_files(job_id)}
    files = [artifact.file for artifact in artifacts.values()]
    body = stream_zip(files, lambda name: service.artifacts.read(artifacts[name]))
    headers = {"Content-Disposition": _attachment(f"{job_id}.zip")}
    return StreamingResponse(body, headers=headers, media_type="application/zip")


def _media_type(name: str) -> str:
    suffix = f".{name.rpartition('.')[2]}"
    return _MEDIA_TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"


def _attachment(name: str) -> str:
    """The Content-Disposition. Needs no escaping: the service publishes names of letters, digits, '_', '-' and '.'."""
    return f'attachment; filename="{name}"'
