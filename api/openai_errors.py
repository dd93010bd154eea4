"""Errors as OpenAI's clients read them: every request under /v1 is answered in this shape."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from api.schemas import Finding

PREFIX = "/v1/"

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class OpenAIError(BaseModel):
    message: str = Field(description="What happened, to which object, and what to do.")
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(description="The parameter or field at fault, with dots between the names.")
    code: str = Field(description="Stable: programs may rely on it.")
    findings: list[Finding] = Field(description="All faults, each with its place; of a file's rows, the first hundred.")
    details: dict[str, Any]


class OpenAIErrorResponse(BaseModel):
    """Every error under /v1."""

    error: OpenAIError


def on_openai_wire(
    error: dict[str, Any], status: int, *, waiting_helps: bool = True
) -> tuple[dict[str, Any], int, dict[str, str]]:
    """The error, its status and further headers, of an error in our own shape."""
    status = 400 if status == 422 else status  # the client's BadRequestError
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    body = {
        "message": error["message"],
        "type": kind,
        "param": _param(error["location"]),
        "code": error["code"],
        "findings": error["findings"],
        "details": error["details"],
    }
    # The client would send these twice more, a file that there is no room for among them.
    futile = status == 409 or not waiting_helps
    return body, status, {"x-should-retry": "false"} if futile else {}


def _param(location: str | None) -> str | None:
    if location is None or not location.startswith("/"):
        return location
    return location[1:].replace("/", ".") or None
