"""A child process that runs chat templates under caps on time, memory and output."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any

from qlora_service.data.chat_template import Span
from qlora_service.data.examples import Chat
from qlora_service.errors import InvalidDataset, InvalidModel

MEMORY_BYTES = 1 << 30
ROW_CHARS = 16 << 20
ANSWER_BYTES = 256 << 20
START_S = 20.0
BATCH_S = 20.0
ROW_S = 5.0
# Long conversations get more, up to `MAX_EXTRA_S`. Measured with ChatML, the simplest template, on one core: 0.4 µs
# for a message and 1 to 3 ns for a character, each time it is rendered; other templates and busy machines need up to
# 50 times that.
MESSAGE_S = 20e-6
CHARACTER_S = 100e-9
MAX_EXTRA_S = 60.0
# So many deaths in a row are the template's fault; so many among rows that succeed are the rows'.
MAX_DEATHS_IN_A_ROW = 3
MAX_DEATHS = 20


@dataclass(frozen=True)
class RenderedChat:
    """A conversation's text and the character spans of its trained answers; or why there is none."""

    text: str = ""
    spans: tuple[Span, ...] = ()
    error: str | None = None


class TemplateProcess:
    """Renders conversations with one template; a context manager that leaves no process behind."""

    def __init__(self, template: str, special_tokens: dict[str, str], now: datetime) -> None:
        self._setup = {
            "template": template,
            "special_tokens": special_tokens,
            "now": now.isoformat(),
            "memory_bytes": MEMORY_BYTES,
            "row_chars": ROW_CHARS,
            "cpu_s": START_S,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._deaths = 0
        self._deaths_in_a_row = 0

    def __enter__(self) -> TemplateProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()

    def render(self, chats: Sequence[Chat]) -> Iterator[RenderedChat]:
        """One result per conversation, in order.

        Raises:
            InvalidModel: the template does not compile, or hangs or crashes on one conversation after the other.
            InvalidDataset: it hangs or crashes on too many, though not on all.
        """
        rows = [[[_as_templates_expect(m) for m in chat.messages], chat.trained, chat.tools] for chat in chats]
        extra_s = [_extra_s(chat) for chat in chats]
        try:
            answers: Iterable[dict[str, Any]] = self._ask(rows, BATCH_S + min(sum(extra_s), MAX_EXTRA_S))
        except _ChildDied:
            # One conversation hung or crashed the template: find out which, the others are fine.
            answers = map(self._ask_one, rows, extra_s)
        for answer in answers:
            if "error" in answer:
                yield RenderedChat(error=answer["error"])
            else:
                yield RenderedChat(answer["text"], tuple((start, end) for start, end in answer["spans"]))

    def _ask_one(self, row: Any, extra_s: float) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = self._ask([row], ROW_S + min(extra_s, MAX_EXTRA_S))[0]
            return answer
        except _ChildDied as died:
            self._deaths += 1
            self._deaths_in_a_row += 1
            if self._deaths_in_a_row >= MAX_DEATHS_IN_A_ROW:
                raise InvalidModel(
                    f"the base model's chat template {died} on {self._deaths_in_a_row} conversations in a row: "
                    "it cannot be used; import the model with a sound template",
                    location="/base_model",
                ) from None
            if self._deaths >= MAX_DEATHS:
                raise InvalidDataset(
                    f"the base model's chat template {died} on one conversation and failed so on {self._deaths - 1} "
                    "before it: split the longest conversations into shorter ones, or use another base model",
                    location="/dataset",
                ) from None
            return {"error": f"the chat template {died} on this conversation"}

    def _ask(self, rows: list[Any], limit_s: float) -> list[Any]:
        if self._process is None:
            self._start()
        answer: list[Any] = self._exchange({"rows": rows, "cpu_s": limit_s}, limit_s)
        self._deaths_in_a_row = 0
        return answer

    def _start(self) -> None:
        # An environment of its own: nothing of the service's (keys, tokens) for a template to find.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qlora_service.data.chat_template"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                "PYTHONIOENCODING": "utf-8",
            },
        )
        try:
            answer = self._exchange(self._setup, START_S)
        except _ChildDied as died:
            raise InvalidModel(
                f"the base model's chat template {died} while it was compiled", location="/base_model"
            ) from None
        if "error" in answer:
            raise InvalidModel(f"base model: {answer['error']}", location="/base_model")

    def _exchange(self, message: Any, limit_s: float) -> Any:
        """Send one JSON line and read one, within `limit_s` seconds. Raises: _ChildDied, with the child gone."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = time.monotonic() + limit_s
        outgoing = memoryview(json.dumps(message).encode() + b"\n")
        incoming = bytearray()
        os.set_blocking(process.stdin.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdin, selectors.EVENT_WRITE)
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._died(f"did not finish within {limit_s:g} s")
                for key, _ in selector.select(left):
                    if key.fileobj is process.stdin:
                        try:
                            outgoing = outgoing[os.write(process.stdin.fileno(), outgoing) :]
                        except BrokenPipeError:
                            raise self._died("crashed") from None
                        if not outgoing:
                            selector.unregister(process.stdin)
                    else:
                        chunk = os.read(process.stdout.fileno(), 1 << 20)
                        incoming += chunk
                        if not chunk:
                            raise self._died("crashed")
                        if len(incoming) > ANSWER_BYTES:
                            raise self._died(f"wrote more than {ANSWER_BYTES >> 20} MiB")
                        if chunk.endswith(b"\n"):
                            return json.loads(incoming)

    def _died(self, how: str) -> _ChildDied:
        self._kill()
        return _ChildDied(how)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _extra_s(chat: Chat) -> float:
    """Seconds a long conversation may take beyond the usual: its template may render it four times for each answer."""
    renderings = 1 + 4 * sum(chat.trained)
    return renderings * (MESSAGE_S * len(chat.messages) + CHARACTER_S * characters([chat.messages, chat.tools]))


def characters(value: Any) -> int:
    """The characters of all strings in JSON's types, keys left out."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(characters, value.values()))
    return sum(map(characters, value)) if isinstance(value, list | tuple) else 0


def _as_templates_expect(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its tool calls' arguments as objects: OpenAI sends JSON text, templates apply `tojson`."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    decoded = []
    for call in calls:
        function = dict(call.get("function") or {})
        if isinstance(function.get("arguments"), str):
            with contextlib.suppress(ValueError):
                function["arguments"] = json.loads(function["arguments"])
        decoded.append({**call, "function": function})
    return {**message, "tool_calls": decoded}


class _ChildDied(Exception):
    pass
