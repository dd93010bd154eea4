"""What a model's answers look like on OpenAI's wire: whole, and in pieces."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from qlora_service.chat.wire import Finished
from qlora_service.domain.ids import new_id

FinishReason = Literal["stop", "length"]


class Usage(BaseModel):
    """Counts of tokens."""

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
    finish_reason: FinishReason = Field(description="stop: it ended by itself, or at a stop text; length: no room.")


class ChatCompletion(BaseModel):
    """The answer to a conversation."""

    id: str = Field(examples=["chatcmpl-019a9c2f8d31c4e55f0a7b"])
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="Seconds since 1970.")
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
    created: int = Field(description="Seconds since 1970.")
    model: str
    choices: list[TextChoice]
    usage: Usage


class ChatWriter:
    """Writes one answer to a conversation."""

    def __init__(self, model: str) -> None:
        own_part = new_id("x").partition("_")[2]
        self._head: dict[str, Any] = {"id": f"chatcmpl-{own_part}", "created": int(time.time()), "model": model}

    def whole(self, pieces: Sequence[str], finished: Finished) -> BaseModel:
        message = ChatMessage(content="".join(pieces))
        choice = ChatChoice(message=message, finish_reason=finished.reason)
        return ChatCompletion(**self._head, choices=[choice], usage=Usage.of(finished))

    def opening(self) -> list[dict[str, Any]]:
        """The chunks that come before the first piece."""
        return [self._chunk({"role": "assistant", "content": ""})]

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text})

    def end(self, finished: Finished) -> dict[str, Any]:
        return self._chunk({}, finished.reason)

    def usage(self, finished: Finished) -> dict[str, Any]:
        chunk = self._chunk({})
        return chunk | {"choices": [], "usage": Usage.of(finished).model_dump()}

    def _chunk(self, delta: dict[str, str], finish_reason: FinishReason | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], "usage": None}


class TextWriter:
    """Writes one continuation of a text."""

    def __init__(self, model: str) -> None:
        own_part = new_id("x").partition("_")[2]
        self._head: dict[str, Any] = {"id": f"cmpl-{own_part}", "created": int(time.time()), "model": model}

    def whole(self, pieces: Sequence[str], finished: Finished) -> BaseModel:
        choice = TextChoice(text="".join(pieces), finish_reason=finished.reason)
        return Completion(**self._head, choices=[choice], usage=Usage.of(finished))

    def opening(self) -> list[dict[str, Any]]:
        """Nothing comes before the first piece."""
        return []

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk(text)

    def end(self, finished: Finished) -> dict[str, Any]:
        return self._chunk("", finished.reason)

    def usage(self, finished: Finished) -> dict[str, Any]:
        return self._chunk("") | {"choices": [], "usage": Usage.of(finished).model_dump()}

    def _chunk(self, text: str, finish_reason: FinishReason | None = None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "text_completion", "choices": [choice], "usage": None}
