"""Responses of the completion endpoints in OpenAI's format: complete, and as chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from qlora_service.chat.wire import Finished
from qlora_service.domain.ids import new_id

FinishReason = Literal["stop", "length"]


class Usage(BaseModel):
    """Token counts of a request and its completion."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, finished: Finished) -> Usage:
        prompt, completion = finished.prompt_tokens, finished.completion_tokens
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: Literal[0] = 0
    message: ChatMessage
    logprobs: None = None
    finish_reason: FinishReason = Field(
        description="`stop`: the model ended its turn, or a stop string occurred. `length`: the limit of tokens was "
        "reached."
    )


class ChatCompletion(BaseModel):
    """The model's reply to a conversation."""

    id: str = Field(examples=["chatcmpl-019a9c2f8d31c4e55f0a7b"])
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="Unix time in seconds.")
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    index: Literal[0] = 0
    text: str
    logprobs: None = None
    finish_reason: FinishReason


class Completion(BaseModel):
    """The continuation of a text."""

    id: str = Field(examples=["cmpl-019a9c2f8d31c4e55f0a7b"])
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(description="Unix time in seconds.")
    model: str
    choices: list[TextChoice]
    usage: Usage


class ChatWriter:
    """Formats one chat completion, either as one object or as chunks."""

    def __init__(self, model: str) -> None:
        self._head = _head("chatcmpl", model)

    def complete(self, pieces: Sequence[str], finished: Finished) -> BaseModel:
        message = ChatMessage(content="".join(pieces))
        choice = ChatChoice(message=message, finish_reason=finished.reason)
        return ChatCompletion(**self._head, choices=[choice], usage=Usage.of(finished))

    def opening_chunks(self) -> list[dict[str, Any]]:
        """The chunks before the first text."""
        return [self._chunk({"role": "assistant", "content": ""})]

    def text_chunk(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text})

    def final_chunk(self, finished: Finished) -> dict[str, Any]:
        return self._chunk({}, finished.reason)

    def usage_chunk(self, finished: Finished) -> dict[str, Any]:
        chunk = self._chunk({})
        return chunk | {"choices": [], "usage": Usage.of(finished).model_dump()}

    def _chunk(self, delta: dict[str, str], finish_reason: FinishReason | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], "usage": None}


class TextWriter:
    """Formats one text completion, either as one object or as chunks."""

    def __init__(self, model: str) -> None:
        self._head = _head("cmpl", model)

    def complete(self, pieces: Sequence[str], finished: Finished) -> BaseModel:
        choice = TextChoice(text="".join(pieces), finish_reason=finished.reason)
        return Completion(**self._head, choices=[choice], usage=Usage.of(finished))

    def opening_chunks(self) -> list[dict[str, Any]]:
        """No chunks: a text completion has none before the first text."""
        return []

    def text_chunk(self, text: str) -> dict[str, Any]:
        return self._chunk(text)

    def final_chunk(self, finished: Finished) -> dict[str, Any]:
        return self._chunk("", finished.reason)

    def usage_chunk(self, finished: Finished) -> dict[str, Any]:
        return self._chunk("") | {"choices": [], "usage": Usage.of(finished).model_dump()}

    def _chunk(self, text: str, finish_reason: FinishReason | None = None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "text_completion", "choices": [choice], "usage": None}


def _head(id_prefix: str, model: str) -> dict[str, Any]:
    """The fields that a completion and all its chunks share."""
    unique = new_id("x").partition("_")[2]
    return {"id": f"{id_prefix}-{unique}", "created": int(time.time()), "model": model}
