"""The one table from errors to status codes, and the JSON response to every error."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from obstore.exceptions import GenericError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from api.openai_errors import PREFIX as OPENAI_PREFIX
from api.openai_errors import to_openai_error
from api.schemas import ErrorResponse
from qlora_service.errors import (
    Conflict,
    Finding,
    InvalidDataset,
    InvalidModel,
    InvalidRequest,
    NotFound,
    ObjectLimitReached,
    QLoRAError,
    QuotaExceeded,
    TooLarge,
    Unauthenticated,
    Unavailable,
)
from qlora_service.store.database import is_full, is_outage

RETRY_AFTER_S = 5
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_SCHEMA = {"$ref": "#/components/schemas/ErrorResponse"}


class InvalidJSON(InvalidRequest):
    """The body is not JSON, or it is JSON that parsers read differently."""

    code = "invalid_json"


class Forbidden(InvalidRequest):
    """The host name, the web page or the key of the request is not allowed to do this."""

    code = "forbidden"


class MalformedRequest(InvalidRequest):
    """The bytes received are not an HTTP/1.1 request, or its head is too large."""

    code = "malformed_request"


class RequestTimeout(InvalidRequest):
    """The request did not arrive in time; raised only by `api.http.protocol`."""

    code = "request_timeout"


class UnsupportedMediaType(InvalidRequest):
    code = "unsupported_media_type"


class RangeNotSatisfiable(InvalidRequest):
    """The Range header names only bytes beyond the end of the file; `details["size"]` is the file's size in bytes."""

    code = "range_not_satisfiable"


STATUS: dict[type[QLoRAError], int] = {
    InvalidJSON: 400,
    MalformedRequest: 400,
    Unauthenticated: 401,
    Forbidden: 403,
    NotFound: 404,
    RequestTimeout: 408,
    Conflict: 409,
    TooLarge: 413,
    UnsupportedMediaType: 415,
    RangeNotSatisfiable: 416,
    InvalidRequest: 422,
    QuotaExceeded: 429,
    QLoRAError: 500,
    Unavailable: 503,
}

SPEC_LOCATIONS: dict[type[QLoRAError], str] = {InvalidModel: "/base_model", InvalidDataset: "/dataset"}
"""Fields of a spec that errors of these classes refer to, if they have no location of their own"""

_EXAMPLES: dict[int, tuple[str, str, str | None]] = {
    400: ("invalid_json", "the body is not valid JSON: Expecting value at line 1, column 16", None),
    401: ("unauthenticated", "this needs a key: send the header 'Authorization: Bearer qk_…'", "authorization"),
    403: ("forbidden", "the service is not known as 'gpu.example': add the name to QLORA_ALLOWED_HOSTS", "host"),
    404: ("not_found", "there is no job 'job_1'; GET /jobs lists them", "job_id"),
    408: ("request_timeout", "the request's body did not arrive in time: send the request again", None),
    409: ("conflict", "job job_1 has succeeded already: there is nothing left to cancel", None),
    413: ("too_large", "the body is larger than 100 bytes", None),
    415: ("unsupported_media_type", "send application/json or multipart/form-data", "content-type"),
    416: ("range_not_satisfiable", "the file has 10 bytes, the Range header asks for none of them", "range"),
    422: ("invalid_spec", "/training/lr: unknown field 'lr': did you mean 'learning_rate'?", "/training/lr"),
    429: ("rate_limited", "more than 60 requests a minute came under one key: go on in 1 s", None),
    500: ("internal_error", "the service failed; its log says more under request req_1", None),
    503: ("unavailable", "the database does not answer; try again later", None),
}
_DESCRIPTIONS = {
    400: "The request is not valid HTTP, or its body is not valid JSON",
    401: "No key, or a key that is unknown or revoked",
    403: "The key lacks the required scope, or the host name or web page is not allowed",
    404: "The object does not exist",
    408: "The request did not arrive in time",
    409: "The state of the object does not allow this",
    413: "The request exceeds a size limit",
    415: "The body is neither JSON nor multipart",
    416: "The range lies outside the file",
    422: "The request is invalid; `findings` lists every error with its location",
    429: "Over a quota or rate limit: retry after Retry-After seconds; without this header, waiting does not help",
    500: "A defect of the service",
    503: "Temporarily unavailable: retry after Retry-After seconds",
}


def error_responses(*statuses: int, guarded: bool = True) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI `responses` of a route that may answer with these error statuses.

    Statuses that every route may answer with are added: 400 and 408 (the request did not arrive complete or in time,
    `api.http.protocol`), 503 (no database connection, or too many open connections) and 500. A `guarded` route also
    rejects unknown hosts and web pages (403, `api.access.origins`), and requests with no key (401), with a key that
    lacks the scope (403) or with a key that exceeds its rate limit (429, `api.access.auth`).
    """
    return {
        status: {
            "model": ErrorResponse,
            "description": _DESCRIPTIONS[status],
            "content": {"application/json": {"schema": _SCHEMA, "example": _example(status)}},
        }
        for status in sorted({*statuses, *([401, 403, 429] if guarded else []), 400, 408, 500, 503})
    }


def status_of(error: QLoRAError) -> int:
    """The status of the nearest base class in the table."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


@contextmanager
def error_locations(locations: Mapping[type[QLoRAError], str]) -> Iterator[None]:
    """Sets the location of errors of these classes: only the route knows where in the request their cause is."""
    try:
        yield
    except tuple(locations) as error:
        error.location = next(locations[kind] for kind in type(error).__mro__ if kind in locations)
        raise


def install_handlers(app: FastAPI) -> None:
    """Gives every error response of `app`, including the framework's own, the one shape."""
    app.add_exception_handler(QLoRAError, _handle_error)
    app.add_exception_handler(RequestValidationError, _handle_validation_error)
    app.add_exception_handler(HTTPException, _handle_http_exception)


def internal_error_response(request_id: str) -> JSONResponse:
    """The response to an unexpected exception: it names the request id of the log line and nothing else."""
    error = QLoRAError(f"the service failed; its log says more under request {request_id}", request_id=request_id)
    return _response(error.as_dict(), 500)


def stopping_response() -> JSONResponse:
    """The response to a request that is still running when the server stops."""
    return response_of(
        Unavailable("the service is stopping: check whether the request took effect, then send it again")
    )


def as_unavailable(error: Exception) -> Unavailable | None:
    """The 503 for a failure caused by a full disk or by the database; None for any other failure."""
    if _is_full(error):
        return Unavailable(
            "there is no space left for the service's data: free disk space for QLORA_DATA_DIR, then send the request "
            "again"
        )
    if is_outage(error):
        return Unavailable(
            "the database does not answer, or another process has locked it for too long: send the request again; "
            "if that does not help, check the disk of QLORA_DATA_DIR"
        )
    return None


def response_of(error: QLoRAError) -> JSONResponse:
    """The JSON response to an error, with its status and headers."""
    headers = {}
    if (retry_after_s := _retry_after_s(error)) is not None:
        headers["Retry-After"] = str(retry_after_s)
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, RangeNotSatisfiable):
        headers["Content-Range"] = f"bytes */{error.details['size']}"
    return _response(error.as_dict(), status_of(error), headers)


def _example(status: int) -> dict[str, Any]:
    code, message, location = _EXAMPLES[status]
    findings: list[dict[str, Any]] = []
    if status == 422:
        findings = [{"reason": message.partition(": ")[2], "pointer": location}]
    return {"error": {"code": code, "message": message, "location": location, "findings": findings, "details": {}}}


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in NO_SPACE
    if is_full(error):
        return True
    # The artifact store reports errors of the system only as text.
    number = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, GenericError) else None
    return number is not None and int(number[1]) in NO_SPACE


def _retry_after_s(error: QLoRAError) -> int | None:
    """Seconds until a retry; None if waiting does not help."""
    waiting_helps = isinstance(error, Unavailable | QuotaExceeded) and not isinstance(error, ObjectLimitReached)
    return int(error.details.get("retry_after_s", RETRY_AFTER_S)) if waiting_helps else None


async def _handle_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, QLoRAError)
    request.state.error_code = error.code
    return response_of(error)


async def _handle_validation_error(request: Request, error: Exception) -> JSONResponse:
    """Path, query and header parameters only: the routes parse their bodies themselves."""
    assert isinstance(error, RequestValidationError)
    locations = [".".join(str(part) for part in fault["loc"][1:]) for fault in error.errors()]
    findings = [
        Finding(f"{location}: {fault['msg']}" if location else "the body has to be a JSON object")
        for location, fault in zip(locations, error.errors(), strict=True)
    ]
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    invalid = InvalidRequest(f"{findings[0].reason}{more}", location=locations[0] or None, findings=findings)
    return await _handle_error(request, invalid)


async def _handle_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    route = f"{request.method} {request.url.path}"
    messages = {
        404: f"there is no {route}; /docs lists every route",
        405: f"{route} is not allowed; /docs lists the methods of every path",
    }
    body = QLoRAError(messages.get(error.status_code, str(error.detail))).as_dict()
    body["code"] = request.state.error_code = codes.get(error.status_code, "invalid_request")
    return _response(body, error.status_code, error.headers)


def _response(error: dict[str, Any], status: int, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return _ErrorJSONResponse(error, status, dict(headers or {}))


class _ErrorJSONResponse(JSONResponse):
    """An error in the service's own shape; for paths under /v1, it is sent in OpenAI's shape."""

    def __init__(self, error: dict[str, Any], status: int, headers: dict[str, str]) -> None:
        super().__init__({"error": error}, status, headers)
        self._error, self._own_headers = error, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["path"].startswith(OPENAI_PREFIX):
            await super().__call__(scope, receive, send)
            return
        waiting_helps = self.status_code != 429 or "Retry-After" in self._own_headers
        error, status, openai_headers = to_openai_error(self._error, self.status_code, waiting_helps=waiting_helps)
        await JSONResponse({"error": error}, status, self._own_headers | openai_headers)(scope, receive, send)
