"""The header Idempotency-Key: a POST that is sent again with its key takes effect once and is answered the same."""

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
from qlora_service.store.idempotency import Answer, Attempt, Once, Replay

HEADER = "Idempotency-Key"
REPLAYED = "Idempotent-Replayed"
RETRY_COUNT = "X-Stainless-Retry-Count"

_KEY = re.compile(r"[\x20-\x7e]{1,255}")

Result = TypeVar("Result")


class Idempotency:
    """A request's key, if it has one, and what the request is, as far as its head says.

    Without a key, an `attempt` says that the client counts how often it sends a request: then the key is made of what
    the request asks for.
    """

    def __init__(self, key: str | None, attempt: Attempt | None, project: str, head: tuple[str, ...]) -> None:
        self._key = key
        self._attempt = attempt if key is None else None
        self._project = project
        self._head = head

    @property
    def _is_asked_for(self) -> bool:
        return self._key is not None or self._attempt is not None

    def once(
        self,
        render: Callable[[Result], BaseModel],
        *,
        status: int = 200,
        content: object = None,
        location: Callable[[Result], str] | None = None,
    ) -> Once[Result] | None:
        """What makes the action happen once; None for a request without a key or a count.

        `content` is the body's meaning as JSON, None for a request without a body.
        """
        if not self._is_asked_for:
            return None

        def answer(result: Result) -> Answer:
            headers = {} if location is None else {"Location": location(result)}
            # By way of JSON: the answer itself writes NaN as null.
            return {"status": status, "headers": headers, "body": json.loads(render(result).model_dump_json())}

        meaning = json.dumps([*self._head, content], sort_keys=True, separators=(",", ":"))
        fingerprint = hashlib.sha256(meaning.encode()).hexdigest()
        # No client can choose this key: what it sends is ASCII.
        key = f"\u21bb {fingerprint}" if self._key is None else self._key
        return Once(key, self._project, fingerprint, answer, self._attempt)

    def file_content(self, path: Path) -> str | None:
        """What a raw body means: its SHA-256; None where nothing asks for it."""
        return _sha256(path) if self._is_asked_for else None

    def form_content(self, form: Form, fields: Mapping[str, object]) -> object:
        """What a form means, whatever the boundary and the order of its parts; None where nothing asks for it."""
        if not self._is_asked_for:
            return None
        files = {name: [part.filename, _sha256(part.path)] for name, part in form.files.items()}
        return {"fields": dict(fields), "files": files}


def _idempotency(
    request: Request,
    service: ServiceOf,
    sent: Annotated[
        list[str] | None,
        WithJsonSchema({"type": "string", "pattern": f"^{_KEY.pattern}$"}),
        Header(
            alias=HEADER,
            description="1 to 255 printable ASCII characters of your choice, such as a UUID, new for every new "
            "request. The same request under the same key takes effect once and gets the same answer, for 7 days; "
            f"`{REPLAYED}: true` marks an answer that was given before. Another request under the key is a conflict. "
            "Refusals are not kept: what was refused may be corrected and sent again under its key.",
        ),
    ] = None,
) -> Idempotency:
    """Raises: InvalidRequest."""
    sent = sent or []
    if len(sent) > 1 or not all(_KEY.fullmatch(key) for key in sent):
        raise InvalidRequest(
            f"the header {HEADER} cannot be used: send it once, with 1 to 255 printable ASCII characters, such as a "
            "UUID, or leave it out",
            location=HEADER.lower(),
        )
    query = json.dumps(sorted(request.query_params.multi_items()))
    head = (request.method, request.url.path, query)
    return Idempotency(sent[0] if sent else None, _attempt(request), service.project, head)


def _attempt(request: Request) -> Attempt | None:
    """As clients count that send no Idempotency-Key, such as OpenAI's; None where the client does not count."""
    count = request.headers.get(RETRY_COUNT, "")
    return Attempt(utc_now(), is_retry=count.strip("0") != "") if count.isdecimal() else None


IdempotencyOf = Annotated[Idempotency, Depends(_idempotency)]


async def answer_again(_: Request, replay: Exception) -> JSONResponse:
    """The answer that the request got the first time."""
    assert isinstance(replay, Replay)
    answer = replay.answer
    return JSONResponse(answer["body"], answer["status"], {**answer["headers"], REPLAYED: "true"})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
