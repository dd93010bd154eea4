"""Errors in OpenAI's shape, the response to every failed request under /v1."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from api.schemas import Finding

PREFIX = "/v1/"

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class OpenAIError(BaseModel):
    message: str = Field(description="What happened, to which object, and what to do.")
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(description="The invalid parameter or field, as names joined by dots.")
    code: str = Field(description="Stable error code for programs.")
    findings: list[Finding] = Field(
        description="All errors in the input, each with its location; for the rows of a file, the first hundred."
    )
    details: dict[str, Any]


class OpenAIErrorResponse(BaseModel):
    """The body of every error response under /v1."""

    error: OpenAIError


def to_openai_error(
    error: dict[str, Any], status: int, *, waiting_helps: bool = True
) -> tuple[dict[str, Any], int, dict[str, str]]:
    """The error in OpenAI's shape, its status and additional headers.

    `error` is `QLoRAError.as_dict()`; with `waiting_helps` false, the headers tell OpenAI's client not to retry.
    """
    status = 400 if status == 422 else status  # the client's BadRequestError
    error_type = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    body = {
        "message": error["message"],
        "type": error_type,
        "param": _param(error["location"]),
        "code": error["code"],
        "findings": error["findings"],
        "details": error["details"],
    }
    # Without the header, the client retries these twice, including an upload of a file over the storage quota.
    retry_does_not_help = status == 409 or not waiting_helps
    return body, status, {"x-should-retry": "false"} if retry_does_not_help else {}


def _param(location: str | None) -> str | None:
    if location is None or not location.startswith("/"):
        return location
    return location[1:].replace("/", ".") or None
