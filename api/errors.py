"""The one table from errors to status codes, and the JSON in which all of them are answered."""

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
from api.openai_errors import on_openai_wire
from api.schemas import ErrorResponse
from qlora_service.errors import (
    Conflict,
    Finding,
    InvalidRequest,
    NoRoom,
    NotFound,
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
    """The body is no JSON, or JSON that can be read in two ways."""

    code = "invalid_json"


class Forbidden(InvalidRequest):
    """Asked under a name, from a page or with a key that may not."""

    code = "forbidden"


class MalformedRequest(InvalidRequest):
    """What arrived is no HTTP request, or holds what no text can."""

    code = "malformed_request"


class RequestTimeout(InvalidRequest):
    """The request did not arrive in time; answered by `api.http.protocol` alone."""

    code = "request_timeout"


class UnsupportedMediaType(InvalidRequest):
    code = "unsupported_media_type"


class RangeNotSatisfiable(InvalidRequest):
    """The Range header asks for bytes that the file does not have; `details["size"]` is how many it has."""

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
_MEANING = {
    400: "What arrived is no request, or its body is no JSON",
    401: "No key, or one that is not known or revoked",
    403: "A key without the scope for this, or another host name or web page than the service knows",
    404: "There is no such thing",
    408: "The request did not arrive in time",
    409: "Its state forbids this",
    413: "Over a limit",
    415: "Neither JSON nor multipart",
    416: "The range lies outside the file",
    422: "The request cannot work as it is; every fault is listed with its place",
    429: "Over a quota: try again after Retry-After seconds; without this header, waiting does not help",
    500: "A defect of the service",
    503: "Not now: try again after Retry-After seconds",
}


def error_responses(*statuses: int, guarded: bool = True) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` of a route that may answer with these errors.

    Any may answer that the request did not arrive whole or in time (`api.http.protocol`: 400, 408), that the database
    or a place among the connections is not to be had (503), or fail (500). One that is `guarded` is open to neither
    strangers (`api.access.origins`) nor requests without a key, or with a key that asks too often (`api.access.auth`).
    """
    return {
        status: {
            "model": ErrorResponse,
            "description": _MEANING[status],
            "content": {"application/json": {"schema": _SCHEMA, "example": _example(status)}},
        }
        for status in sorted({*statuses, *([401, 403, 429] if guarded else []), 400, 408, 500, 503})
    }


def _example(status: int) -> dict[str, Any]:
    code, message, location = _EXAMPLES[status]
    findings: list[dict[str, Any]] = []
    if status == 422:
        findings = [{"reason": message.partition(": ")[2], "pointer": location}]
    return {"error": {"code": code, "message": message, "location": location, "findings": findings, "details": {}}}


def status_of(error: QLoRAError) -> int:
    """The status of the nearest class that the table names."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


@contextmanager
def located(places: Mapping[type[QLoRAError], str]) -> Iterator[None]:
    """Errors of these classes leave with their place in the request, which only the route knows."""
    try:
        yield
    except tuple(places) as error:
        error.location = next(places[kind] for kind in type(error).__mro__ if kind in places)
        raise


def install_handlers(app: FastAPI) -> None:
    """Every error of `app`, the framework's own included, is answered in the one shape."""
    app.add_exception_handler(QLoRAError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)


def internal_error(request_id: str) -> JSONResponse:
    """The answer to what nobody foresaw: it names the log line and nothing else."""
    error = QLoRAError(f"the service failed; its log says more under request {request_id}", request_id=request_id)
    return _response(error.as_dict(), 500)


def stopping() -> JSONResponse:
    """The answer to a request that outlives the server."""
    return refusal(Unavailable("the service is stopping: see whether the request took effect, then send it again"))


def outage(error: Exception) -> Unavailable | None:
    """What a request that fails for want of disk space or the database is answered; None for any other failure."""
    if _is_full(error):
        return Unavailable(
            "there is no space left for the service's data: free some on the disk of QLORA_DATA_DIR, then send the "
            "request again"
        )
    if is_outage(error):
        return Unavailable(
            "the database does not answer, or another process has locked it for too long: send the request again; "
            "if that does not help, see to the disk of QLORA_DATA_DIR"
        )
    return None


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in NO_SPACE
    if is_full(error):
        return True
    # The artifact store hands the system's errors on as text.
    number = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, GenericError) else None
    return number is not None and int(number[1]) in NO_SPACE


def refusal(error: QLoRAError) -> JSONResponse:
    """The answer that says what `error` says."""
    headers = {}
    if (retry_after_s := _retry_after_s(error)) is not None:
        headers["Retry-After"] = str(retry_after_s)
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, RangeNotSatisfiable):
        headers["Content-Range"] = f"bytes */{error.details['size']}"
    return _response(error.as_dict(), status_of(error), headers)


def _retry_after_s(error: QLoRAError) -> int | None:
    """When to send the request again; None where that would not help."""
    waiting_helps = isinstance(error, Unavailable | QuotaExceeded) and not isinstance(error, NoRoom)
    return int(error.details.get("retry_after_s", RETRY_AFTER_S)) if waiting_helps else None


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, QLoRAError)
    request.state.error_code = error.code
    return refusal(error)


async def _answer_validation_error(request: Request, error: Exception) -> JSONResponse:
    """Path, query and header parameters; bodies are parsed by the routes."""
    assert isinstance(error, RequestValidationError)
    places = [".".join(str(part) for part in fault["loc"][1:]) for fault in error.errors()]
    findings = [
        Finding(f"{place}: {fault['msg']}" if place else "the body has to be a JSON object")
        for place, fault in zip(places, error.errors(), strict=True)
    ]
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    invalid = InvalidRequest(f"{findings[0].reason}{more}", location=places[0] or None, findings=findings)
    return await _answer_error(request, invalid)


async def _answer_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    asked = f"{request.method} {request.url.path}"
    messages = {
        404: f"there is no {asked}; /docs lists what there is",
        405: f"{asked} is not allowed; /docs lists the methods of every path",
    }
    body = QLoRAError(messages.get(error.status_code, str(error.detail))).as_dict()
    body["code"] = request.state.error_code = codes.get(error.status_code, "invalid_request")
    return _response(body, error.status_code, error.headers)


def _response(body: dict[str, Any], status: int, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return _ErrorAnswer(body, status, dict(headers or {}))


class _ErrorAnswer(JSONResponse):
    """An error in our own shape; under /v1 it is sent in OpenAI's."""

    def __init__(self, error: dict[str, Any], status: int, headers: dict[str, str]) -> None:
        super().__init__({"error": error}, status, headers)
        self._error, self._given = error, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["path"].startswith(OPENAI_PREFIX):
            await super().__call__(scope, receive, send)
            return
        waiting_helps = self.status_code != 429 or "Retry-After" in self._given
        error, status, more = on_openai_wire(self._error, self.status_code, waiting_helps=waiting_helps)
        await JSONResponse({"error": error}, status, self._given | more)(scope, receive, send)
