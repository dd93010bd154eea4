"""Shared parts of the /v1 routes: strict JSON bodies, documented errors, parameters."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Path, Query
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from api.access.auth import authenticate
from api.errors import UnsupportedMediaType, error_responses
from api.http.json_body import parse_body, reason_of
from api.http.uploads import receive_bytes
from api.openai_errors import OpenAIErrorResponse, to_openai_error
from api.v1.schemas import FILE_ID, JOB_ID, TUNED_MODEL, UPLOAD_ID

FileId = Annotated[str, Path(description="The id of a file.", examples=[FILE_ID])]
UploadId = Annotated[str, Path(description="The id of an upload.", examples=[UPLOAD_ID])]
FineTuningJobId = Annotated[str, Path(description="The id of a job.", examples=[JOB_ID])]
ModelId = Annotated[str, Path(description="The id of a model.", examples=[TUNED_MODEL])]
After = Annotated[
    str | None, Query(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="Cursor: the last id of the previous page.")
]

_SCHEMA = {"$ref": "#/components/schemas/OpenAIErrorResponse"}
_INVALID = "The request is invalid; `findings` lists every error with its location"


def openai_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI `responses` of a /v1 route: these errors, and those that every route may return."""
    documented: dict[int | str, dict[str, Any]] = {}
    for status, response in error_responses(*({*statuses} - {422})).items():
        native_error = response["content"]["application/json"]["example"]["error"]
        error, _, _ = to_openai_error(native_error, int(status))
        documented[status] = {
            "model": OpenAIErrorResponse,
            "description": _INVALID if status == 400 else response["description"],
            "content": {"application/json": {"schema": _SCHEMA, "example": {"error": error}}},
        }
    return documented


class JsonRoute(APIRoute):
    """A route that parses its JSON body, if it declares one, with the service's strict parser."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        model = self.body_field.field_info.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)

        async def handle_json(request: Request) -> Response:
            await authenticate(request)  # before the body is read
            content_type = request.headers.get("content-type", "")
            if content_type.partition(";")[0].strip().lower() != "application/json":
                raise UnsupportedMediaType(
                    f"Content-Type is {content_type[:100]!r}: send application/json", location="content-type"
                )
            body = await receive_bytes(request)
            try:
                return await handle(_ReadRequest(request, body, parse_body(body)))
            except RequestValidationError as error:
                raise RequestValidationError([_with_reason(fault, model) for fault in error.errors()]) from None

        return handle_json


def _with_reason(fault: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """The validation fault, with the service's own message if it is a fault of the body."""
    source, *path = fault["loc"]
    return fault | {"msg": reason_of(fault, path, model)} if source == "body" and path else fault


class _ReadRequest(Request):
    """A request whose body was read and parsed before."""

    def __init__(self, request: Request, body: bytes, document: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._body_bytes, self._document = body, document

    async def body(self) -> bytes:
        return self._body_bytes

    async def json(self) -> Any:
        return self._document
