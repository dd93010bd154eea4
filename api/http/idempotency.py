"""The Idempotency-Key header: a POST that is sent again with its key takes effect once and gets the same response."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, TypeVar

from fastapi import Depends, Header
from fastapi.responses import JSONResponse
from pydantic import BaseModel, WithJsonSchema
from starlette.requests import Request

from api.dependencies import ServiceOf
from api.http.multipart import Form
from qlora_service.domain.clock import utc_now
from qlora_service.errors import InvalidRequest
from qlora_service.store.idempotency import Answer, Once, Replay, RequestAttempt

HEADER = "Idempotency-Key"
REPLAYED = "Idempotent-Replayed"
RETRY_COUNT = "X-Stainless-Retry-Count"

_KEY = re.compile(r"[\x20-\x7e]{1,255}")

Result = TypeVar("Result")


class Idempotency:
    """The idempotency key of a request, if it has one, with the part of the fingerprint that its head determines.

    Without a key, an `attempt` says that the client counts its retries; then the key is the fingerprint itself.
    """

    def __init__(self, key: str | None, attempt: RequestAttempt | None, project: str, head: tuple[str, ...]) -> None:
        self._key = key
        self._attempt = attempt if key is None else None
        self._project = project
        self._head = head

    @property
    def _is_enabled(self) -> bool:
        return self._key is not None or self._attempt is not None

    def once(
        self,
        render: Callable[[Result], BaseModel],
        *,
        status: int = 200,
        content: object = None,
        location: Callable[[Result], str] | None = None,
    ) -> Once[Result] | None:
        """The key, fingerprint and response with which the action takes effect once; None without key and attempt.

        `render` turns the action's result into the response body. `content` is the meaning of the request's body as
        JSON, None for a request without a body.
        """
        if not self._is_enabled:
            return None

        def answer(result: Result) -> Answer:
            headers = {} if location is None else {"Location": location(result)}
            # Through JSON, so that NaN becomes null as in the response itself.
            return {"status": status, "headers": headers, "body": json.loads(render(result).model_dump_json())}

        request = json.dumps([*self._head, content], sort_keys=True, separators=(",", ":"))
        fingerprint = hashlib.sha256(request.encode()).hexdigest()
        # A client cannot choose this key, because keys of clients are ASCII.
        key = f"\u21bb {fingerprint}" if self._key is None else self._key
        return Once(key, self._project, fingerprint, answer, self._attempt)

    def file_content(self, path: Path) -> str | None:
        """The meaning of a raw body: its SHA-256; None without key and attempt."""
        return _sha256(path) if self._is_enabled else None

    def form_content(self, form: Form, fields: Mapping[str, object]) -> object:
        """The meaning of a form, whatever its boundary and the order of its parts; None without key and attempt."""
        if not self._is_enabled:
            return None
        files = {name: [part.filename, _sha256(part.path)] for name, part in form.files.items()}
        return {"fields": dict(fields), "files": files}


def _idempotency(
    request: Request,
    service: ServiceOf,
    keys: Annotated[
        list[str] | None,
        WithJsonSchema({"type": "string", "pattern": f"^{_KEY.pattern}$"}),
        Header(
            alias=HEADER,
            description="1 to 255 printable ASCII characters, such as a UUID; new for every new request. The same "
            "request with the same key takes effect once and gets the same response, for 7 days; "
            f"`{REPLAYED}: true` marks a replayed response. Another request with the same key is a conflict. Error "
            "responses are not stored: a rejected request may be corrected and sent again with its key.",
        ),
    ] = None,
) -> Idempotency:
    """Raises: InvalidRequest."""
    keys = keys or []
    if len(keys) > 1 or not all(_KEY.fullmatch(key) for key in keys):
        raise InvalidRequest(
            f"the header {HEADER} cannot be used: send it once, with 1 to 255 printable ASCII characters, such as a "
            "UUID, or leave it out",
            location=HEADER.lower(),
        )
    query = json.dumps(sorted(request.query_params.multi_items()))
    head = (request.method, request.url.path, query)
    return Idempotency(keys[0] if keys else None, _attempt(request), service.project, head)


def _attempt(request: Request) -> RequestAttempt | None:
    """The attempt of a client that counts retries instead of sending a key, such as OpenAI's; None without a count."""
    count = request.headers.get(RETRY_COUNT, "")
    return RequestAttempt(utc_now(), is_retry=count.strip("0") != "") if count.isdecimal() else None


IdempotencyOf = Annotated[Idempotency, Depends(_idempotency)]


async def replay_response(_: Request, replay: Exception) -> JSONResponse:
    """The response that the request got the first time."""
    assert isinstance(replay, Replay)
    answer = replay.answer
    return JSONResponse(answer["body"], answer["status"], {**answer["headers"], REPLAYED: "true"})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
