"""Keys of the caller's project. Keys of other projects are created where the service runs, with `qlora keys`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from api.access.auth import ADMIN_TAG, CallerOf
from api.dependencies import KeyId, KeyRegistryOf
from api.errors import error_responses
from api.http.idempotency import Idempotency, IdempotencyOf
from api.http.json_body import parse_body, reason_of
from api.http.uploads import receive_bytes
from api.schemas import Key, KeyRequest, Listing, NewKey
from qlora_service.actions.keys import KeyRegistry
from qlora_service.domain.keys import ApiKey
from qlora_service.errors import Finding, InvalidRequest

router = APIRouter(prefix="/keys", tags=[ADMIN_TAG])

_MAX_BODY_BYTES = 10_000
_SCHEMA = KeyRequest.model_json_schema(ref_template="#/components/schemas/{model}")
del _SCHEMA["$defs"]  # the response models define them too
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": _SCHEMA, "example": {"name": "laptop", "scopes": ["submit"]}}},
    }
}


@router.post(
    "",
    status_code=201,
    summary="Make a key",
    responses=error_responses(409, 413, 422),
    openapi_extra=_BODY,
)
async def create_key(
    request: Request, response: Response, caller: CallerOf, registry: KeyRegistryOf, idempotency: IdempotencyOf
) -> NewKey:
    """Create a key in your own project. The response shows `secret` only once: the service stores its hash.

    In a replayed response, `secret` is null: if the first response was lost, revoke the key and create another. Keys
    of other projects are created where the service runs, with `qlora keys create`.
    """
    body = await receive_bytes(request, _MAX_BODY_BYTES)
    response.headers["Cache-Control"] = "no-store"
    return await run_in_threadpool(_create, registry, caller.project, idempotency, body)


@router.get("", summary="List keys", responses=error_responses(422))
def list_keys(caller: CallerOf, registry: KeyRegistryOf) -> Listing[Key]:
    """All keys of your project, including revoked keys, newest first."""
    return Listing(data=[Key.of(key) for key in registry.list_keys(caller.project)])


@router.delete("/{key_id}", summary="Revoke a key", responses=error_responses(404, 409, 422))
def revoke_key(key_id: KeyId, caller: CallerOf, registry: KeyRegistryOf) -> Key:
    """Revoke the key: requests with it are rejected after at most one second.

    The last admin key of a project cannot be revoked here.
    """
    return Key.of(registry.revoke_key(key_id, caller.project, keep_admin=True))


def _create(registry: KeyRegistry, project: str, idempotency: Idempotency, body: bytes) -> NewKey:
    document = parse_body(body)
    request = _parse_request(document)
    once = idempotency.once(_without_secret, status=201, content={"json": document})
    key, secret = registry.create_key(project, request.name, request.scopes, once=once)
    return NewKey.of(key).model_copy(update={"secret": secret})


def _without_secret(key: ApiKey) -> NewKey:
    """The response stored for replays: stored in plain text, so it must not contain the secret."""
    return NewKey.of(key)


def _parse_request(document: Any) -> KeyRequest:
    """Raises: InvalidRequest."""
    try:
        return KeyRequest.model_validate(document)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        findings = [
            Finding(reason_of(fault, fault["loc"], KeyRequest), "".join(f"/{part}" for part in fault["loc"]))
            for fault in faults
        ]
        raise InvalidRequest(str(findings[0]), location=findings[0].pointer, findings=findings) from None
