"""Multipart uploads of files, in OpenAI's format."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from api.dependencies import ServiceOf, UploadsOf
from api.http.idempotency import Idempotency, IdempotencyOf
from api.http.multipart import MEDIA_TYPE as MULTIPART
from api.http.multipart import Form
from api.http.uploads import display_name
from api.v1 import schemas
from api.v1.files import expiry_not_supported, file_of
from api.v1.rendering import seconds
from api.v1.requests import CompleteUpload, CreateUpload
from api.v1.routes import JsonRoute, UploadId, openai_errors
from qlora_service.actions.service import Service
from qlora_service.actions.uploads import ClosedUpload
from qlora_service.domain.uploads import Part, Upload
from qlora_service.errors import InvalidRequest, TooLarge

router = APIRouter(prefix="/uploads", tags=["openai uploads"], route_class=JsonRoute)

MAX_PART_BYTES = 64 * 2**20
_PART: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "additionalProperties": False,
                    "properties": {"data": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


@router.post("", summary="Begin an upload", responses=openai_errors(409, 413, 415))
def create_upload(
    body: CreateUpload, request: Request, service: ServiceOf, idempotency: IdempotencyOf
) -> schemas.Upload:
    """Begin an upload of a large file in several requests. Add its parts and complete it within an hour."""
    if body.expires_after is not None:
        raise expiry_not_supported()
    limit: int = request.app.state.settings.max_upload_bytes
    if body.bytes > limit:
        raise TooLarge(
            f"the file has {body.bytes} bytes, and the service accepts at most {limit}: split it, or ask the operator "
            "to raise QLORA_MAX_UPLOAD_BYTES",
            location="bytes",
            max_bytes=limit,
        )
    name = display_name(body.filename)
    if name is None:
        raise InvalidRequest(f"{body.filename!r} cannot be used as a file name", location="filename")
    once = idempotency.once(_begun_response, content=body.model_dump(mode="json", exclude_unset=True))
    return _begun_response(
        service.uploads.begin(filename=name, size=body.bytes, purpose=body.purpose, mime_type=body.mime_type, once=once)
    )


@router.post(
    "/{upload_id}/parts",
    summary="Add a part",
    responses=openai_errors(404, 409, 413),
    openapi_extra=_PART,
)
async def create_part(
    request: Request, upload_id: UploadId, service: ServiceOf, uploads: UploadsOf, idempotency: IdempotencyOf
) -> schemas.UploadPart:
    """Add up to 64 MiB of the file. Parts may be sent concurrently."""
    async with uploads.receive_form(request, files=["data"], fields=[]) as form:
        return await run_in_threadpool(_add_part, service, idempotency, upload_id, form)


@router.post("/{upload_id}/complete", summary="Complete an upload", responses=openai_errors(404, 409, 413, 415))
def complete_upload(
    upload_id: UploadId, body: CompleteUpload, service: ServiceOf, idempotency: IdempotencyOf
) -> schemas.Upload:
    """Join the parts in the given order, then check and store the file like any other."""
    once = idempotency.once(_upload_response, content=body.model_dump(mode="json", exclude_unset=True))
    return _upload_response(service.uploads.complete(upload_id, body.part_ids, body.md5, once=once))


@router.post("/{upload_id}/cancel", summary="Cancel an upload", responses=openai_errors(404, 409))
def cancel_upload(upload_id: UploadId, service: ServiceOf, idempotency: IdempotencyOf) -> schemas.Upload:
    """Cancel the upload and delete its parts."""
    return _upload_response(service.uploads.cancel(upload_id, once=idempotency.once(_upload_response)))


def _add_part(service: Service, idempotency: Idempotency, upload_id: str, form: Form) -> schemas.UploadPart:
    data = form.files.get("data")
    if data is None:
        raise InvalidRequest("the form has no part `data`: send the bytes in it", location="data")
    if data.path.stat().st_size > MAX_PART_BYTES:
        raise TooLarge(
            f"the part is larger than {MAX_PART_BYTES} bytes: send smaller parts",
            location="data",
            max_bytes=MAX_PART_BYTES,
        )
    once = idempotency.once(_part_response, content=idempotency.form_content(form, {}))
    return _part_response(service.uploads.add_part(upload_id, data.path, once=once))


def _part_response(part: Part) -> schemas.UploadPart:
    return schemas.UploadPart(id=part.id, created_at=seconds(part.created_at), upload_id=part.upload_id)


def _begun_response(upload: Upload) -> schemas.Upload:
    return _upload_response(ClosedUpload(upload))


def _upload_response(closed: ClosedUpload) -> schemas.Upload:
    upload = closed.upload
    return schemas.Upload(
        id=upload.id,
        bytes=upload.bytes,
        created_at=seconds(upload.created_at),
        expires_at=seconds(upload.expires_at),
        filename=upload.filename,
        status=upload.status.value,
        file=None if closed.dataset is None else file_of(closed.dataset),
    )
