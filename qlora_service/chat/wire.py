"""How the API talks to a process that generates text: JSON lines over a Unix socket, one connection for one answer.

    ──▶ GenerationRequest
    ◀── {"waiting": "loading"}                        every second, whatever else is sent
    ◀── {"text": "Paris"}                             as it is generated
    ◀── {"finished": {"reason": "stop", …}}           or {"error": {"code": …, "message": …}}; then the line ends

Whoever closes the connection wants no more of the answer. The process's supervisor asks `STATUS` in the same way.
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
"""What an answer waits for"""
STATUS = b"status\n"
MAX_LINE_BYTES = 64 << 20
"""Of a request; the API takes no larger one."""
MAX_ADDRESS_BYTES = 100
"""Linux takes socket names of up to 107 bytes, others of 103 (sys/un.h)."""
BEAT_S = 1.0
"""How often a request is told that it is not forgotten."""


class ContextTooLong(InvalidRequest):
    code = "context_length_exceeded"


class Leaving(QLoRAError):
    """The process makes room and begins nothing more: ask anew."""

    code = "leaving"


class Line(BaseModel):
    """A part of the talk, as it is sent."""

    model_config = ConfigDict(frozen=True)

    def line(self) -> bytes:
        return self.model_dump_json(exclude_none=True).encode() + b"\n"


class AdapterRef(Line):
    """A published adapter."""

    job_id: str
    attempt: int


class Sampling(Line):
    """How tokens are chosen, and when to stop."""

    max_tokens: int | None = None
    """None: as many as there is room for"""
    temperature: float = 1.0
    """0 is greedy"""
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


class GenerationRequest(Line):
    """What to continue: a conversation, or plain text."""

    adapter: AdapterRef | None = None
    messages: list[dict[str, Any]] | None = None
    """As training rows have them"""
    tools: list[dict[str, Any]] | None = None
    text: str = ""
    """Instead of `messages`"""
    sampling: Sampling = Sampling()


class Finished(Line):
    """How an answer ended."""

    reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


class Answer(Line):
    """One line of an answer; one of its fields is set."""

    waiting: Place | None = None
    text: str | None = None
    finished: Finished | None = None
    error: dict[str, Any] | None = None


class Status(Line):
    """What a process is at."""

    loading: bool
    busy: bool
    in_line: int
    served: int
    """Requests it has taken up, however they ended"""
    quiet_s: float
    """Since the last sign of progress"""


def as_error(document: dict[str, Any]) -> QLoRAError:
    """The error that an `Answer` brought, as it was raised over there."""
    kinds = (ContextTooLong, InvalidModel, InvalidRequest, Leaving, NotFound, QuotaExceeded, Unavailable)
    kind = next((kind for kind in kinds if kind.code == document["code"]), QLoRAError)
    return kind(document["message"], location=document.get("location"), **document.get("details", {}))


@contextmanager
def address(path: Path) -> Iterator[str]:
    """A name under which the socket can be bound and reached, however deep its directory lies (Linux)."""
    if len(os.fsencode(path)) <= MAX_ADDRESS_BYTES:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def listen(path: Path) -> socket.socket:
    """A socket that only this user reaches; connections wait in it until somebody accepts them."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    with address(path) as name:
        listener.bind(name)
    path.chmod(0o600)
    listener.listen(64)
    return listener


def ask_status(path: Path, patience_s: float) -> Status | None:
    """What the process is at that listens there; None when it does not say so in time."""
    try:
        with socket.socket(socket.AF_UNIX) as connection, address(path) as name:
            connection.settimeout(patience_s)
            connection.connect(name)
            connection.sendall(STATUS)
            with connection.makefile("rb") as answer:
                return Status.model_validate_json(answer.readline(MAX_LINE_BYTES))
    except (OSError, ValueError):
        return None
