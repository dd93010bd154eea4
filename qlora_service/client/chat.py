"""A model's answer as the service streams it, on OpenAI's wire."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from typing import Any

import httpx2

from qlora_service.client.transport import Transport, stranger
from qlora_service.client.wire import ServiceError

PATH = "/v1/chat/completions"
BROKEN_OFF = 503


def stream_answer(transport: Transport, request: Mapping[str, Any]) -> Generator[str, None, None]:
    """The pieces of the answer; closing the iterator ends it.

    Raises:
        ServiceError: the service refuses, or the answer was broken off.
    """
    # The first piece comes when the base model is loaded, and a long prompt is read.
    with transport.stream(PATH, {}, json={**request, "stream": True}, read_s=None) as response:
        for sent in httpx2.EventSource(response):
            if sent.data == "[DONE]":
                return
            try:
                chunk = json.loads(sent.data)
                if "error" in chunk:
                    error = chunk["error"]
                    raise ServiceError(BROKEN_OFF, error["code"], error["message"], error["param"])
                piece = chunk["choices"][0]["delta"].get("content")
            except (ValueError, LookupError, TypeError):
                raise stranger(response) from None
            if piece:
                yield piece
    raise ServiceError(BROKEN_OFF, "broken_off", "the answer was broken off: ask again")
