"""Protocol between the API and an inference process: JSON lines over a Unix socket, one connection per answer.

    ──▶ GenerationRequest
    ◀── {"waiting": "loading"}                        every second, also between other lines
    ◀── {"text": "Paris"}                             during generation
    ◀── {"finished": {"reason": "stop", …}}           or {"error": {"code": …, "message": …}}; then the connection ends

A client cancels the generation by closing the connection. The supervisor sends `STATUS` in place of a request.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from qlora_service.errors import (
    InvalidModel,
    InvalidRequest,
    NotFound,
    QLoRAError,
    QuotaExceeded,
    Unavailable,
)

Place = Literal["loading", "in line", "generating"]
"""The state of a request"""
STATUS = b"status\n"
MAX_LINE_BYTES = 64 << 20
"""Limit of a request; the API accepts no larger one."""
MAX_SOCKET_NAME_BYTES = 100
"""Below the limits of Linux, 107 bytes, and of other systems, 103 (sys/un.h)."""
KEEPALIVE_S = 1.0
"""Interval of the `waiting` lines, which show that the process works."""


class ContextTooLong(InvalidRequest):
    code = "context_length_exceeded"


class YieldingSlot(QLoRAError):
    """The process is about to exit and accepts no more requests: retry with another."""

    code = "leaving"


class Line(BaseModel):
    """A JSON line of the protocol."""

    model_config = ConfigDict(frozen=True)

    def line(self) -> bytes:
        return self.model_dump_json(exclude_none=True).encode() + b"\n"


class AdapterRef(Line):
    """A published adapter."""

    job_id: str
    attempt: int


class Sampling(Line):
    """Sampling parameters and stop conditions."""

    max_tokens: int | None = None
    """None: as many as fit the context"""
    temperature: float = 1.0
    """0 is greedy"""
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


class GenerationRequest(Line):
    """A generation request: a conversation or plain text, and how to continue it."""

    adapter: AdapterRef | None = None
    messages: list[dict[str, Any]] | None = None
    """In the format of training rows"""
    tools: list[dict[str, Any]] | None = None
    text: str = ""
    """Plain text to continue; used when `messages` is None"""
    sampling: Sampling = Sampling()


class Finished(Line):
    """The end of an answer, with its token counts."""

    reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


class Answer(Line):
    """One line of an answer; exactly one field is set."""

    waiting: Place | None = None
    text: str | None = None
    finished: Finished | None = None
    error: dict[str, Any] | None = None


class Status(Line):
    """The state of an inference process."""

    loading: bool
    busy: bool
    in_line: int
    served: int
    """Requests that the process has begun, whatever their outcome"""
    quiet_s: float
    """Seconds since the last sign of progress"""


def rebuild_error(document: dict[str, Any]) -> QLoRAError:
    """The error of an `Answer`, in the class that the inference process raised."""
    classes = (ContextTooLong, InvalidModel, InvalidRequest, YieldingSlot, NotFound, QuotaExceeded, Unavailable)
    error_class = next((known for known in classes if known.code == document["code"]), QLoRAError)
    return error_class(document["message"], location=document.get("location"), **document.get("details", {}))


@contextmanager
def address(path: Path) -> Iterator[str]:
    """A name to bind or connect the socket, within the system's limit even in a deep directory (Linux)."""
    if len(os.fsencode(path)) <= MAX_SOCKET_NAME_BYTES:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def listen(path: Path) -> socket.socket:
    """A listening socket that only this user can connect to; connections queue in it until they are accepted."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    with address(path) as name:
        listener.bind(name)
    path.chmod(0o600)
    listener.listen(64)
    return listener


def query_status(path: Path, patience_s: float) -> Status | None:
    """The state of the process that listens on the socket; None without a valid answer within `patience_s`."""
    try:
        with socket.socket(socket.AF_UNIX) as connection, address(path) as name:
            connection.settimeout(patience_s)
            connection.connect(name)
            connection.sendall(STATUS)
            with connection.makefile("rb") as response:
                return Status.model_validate_json(response.readline(MAX_LINE_BYTES))
    except (OSError, ValueError):
        return None
