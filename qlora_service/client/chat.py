"""Streamed chat completions of the service, in OpenAI's wire format."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from typing import Any

import httpx2

from qlora_service.client.transport import Transport, unexpected_answer
from qlora_service.client.wire import ServiceError

PATH = "/v1/chat/completions"
INTERRUPTED_STATUS = 503
"""Status of an error that arrives inside a stream: the stream itself began with HTTP 200."""


def stream_answer(transport: Transport, request: Mapping[str, Any]) -> Generator[str, None, None]:
    """The pieces of the answer's text; closing the iterator stops the generation.

    Raises:
        ServiceError: the service refused the request, or the answer was interrupted.
    """
    # No read timeout: before the first piece the base model is loaded and the prompt is processed.
    with transport.stream(PATH, {}, json={**request, "stream": True}, read_s=None) as response:
        for event in httpx2.EventSource(response):
            if event.data == "[DONE]":
                return
            try:
                chunk = json.loads(event.data)
                if "error" in chunk:
                    error = chunk["error"]
                    raise ServiceError(INTERRUPTED_STATUS, error["code"], error["message"], error["param"])
                piece = chunk["choices"][0]["delta"].get("content")
            except (ValueError, LookupError, TypeError):
                raise unexpected_answer(response) from None
            if piece:
                yield piece
    raise ServiceError(INTERRUPTED_STATUS, "broken_off", "the answer was interrupted: ask again")
