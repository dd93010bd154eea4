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
from typing import Any, TypeVar, cast

from qlora_service.data.rendering.chat_template import Span
from qlora_service.data.rows.examples import Chat
from qlora_service.errors import InvalidDataset, InvalidModel

Item = TypeVar("Item")

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


@dataclass(frozen=True)
class _Request:
    """A batch of conversations as the child takes them, and the seconds each may need beyond the usual."""

    rows: list[Any]
    extra_s: list[float]

    @property
    def limit_s(self) -> float:
        return BATCH_S + min(sum(self.extra_s), MAX_EXTRA_S)


class _ChildDied(Exception):
    pass


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

    def render(self, chats: Sequence[Chat]) -> list[RenderedChat]:
        """One result per conversation, in order. Raises: as `render_ahead`."""
        ((_, results),) = self.render_ahead([(None, chats)])
        return results

    def render_ahead(self, batches: Iterable[tuple[Item, Sequence[Chat]]]) -> Iterator[tuple[Item, list[RenderedChat]]]:
        """For each batch its item and one result per conversation, in order; the next batch is rendered meanwhile.

        Raises:
            InvalidModel: the template does not compile, or hangs or crashes on one conversation after the other.
            InvalidDataset: it hangs or crashes on too many, though not on all.
        """
        waiting: tuple[Item, _Request] | None = None
        try:
            for item, chats in batches:
                done = None if waiting is None else (waiting[0], self._results(waiting[1]))
                waiting = item, self._request(chats)
                if done is not None:
                    yield done
            if waiting is not None:
                item, request = waiting
                waiting = None
                yield item, self._results(request)
        finally:
            if waiting is not None:
                # An answer nobody waits for any more would be taken for the next batch's.
                self._kill()

    def _request(self, chats: Sequence[Chat]) -> _Request:
        """Ask for a batch without waiting for it."""
        request = _Request(
            [[[_as_templates_expect(m) for m in chat.messages], chat.trained, chat.tools] for chat in chats],
            [_extra_s(chat) for chat in chats],
        )
        if chats:
            # A child that died is noticed by whoever wants its answer.
            with contextlib.suppress(_ChildDied):
                self._send_rows(request.rows, request.limit_s)
        return request

    def _results(self, request: _Request) -> list[RenderedChat]:
        answers: Iterable[dict[str, Any]] = []
        try:
            if request.rows:
                answers = self._receive(request.limit_s)
                self._deaths_in_a_row = 0
        except _ChildDied:
            # One conversation hung or crashed the template: find out which, the others are fine.
            answers = map(self._ask_one, request.rows, request.extra_s)
        return [
            RenderedChat(error=answer["error"])
            if "error" in answer
            else RenderedChat(answer["text"], tuple((start, end) for start, end in answer["spans"]))
            for answer in answers
        ]

    def _ask_one(self, row: Any, extra_s: float) -> dict[str, Any]:
        try:
            limit_s = ROW_S + min(extra_s, MAX_EXTRA_S)
            self._send_rows([row], limit_s)
            (answer,) = self._receive(limit_s)
            self._deaths_in_a_row = 0
            return cast("dict[str, Any]", answer)
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

    def _send_rows(self, rows: list[Any], limit_s: float) -> None:
        if self._process is None:
            self._start()
        self._send({"rows": rows, "cpu_s": limit_s}, limit_s)

    def _start(self) -> None:
        # An environment of its own: nothing of the service's (keys, tokens) for a template to find.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qlora_service.data.rendering.chat_template"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                "PYTHONIOENCODING": "utf-8",
            },
        )
        try:
            self._send(self._setup, START_S)
            answer = self._receive(START_S)
        except _ChildDied as died:
            raise InvalidModel(
                f"the base model's chat template {died} while it was compiled", location="/base_model"
            ) from None
        if "error" in answer:
            raise InvalidModel(f"base model: {answer['error']}", location="/base_model")

    def _send(self, message: Any, limit_s: float) -> None:
        """Write one JSON line within `limit_s` seconds. Raises: _ChildDied, with the child gone."""
        assert self._process is not None
        assert self._process.stdin is not None
        pipe = self._process.stdin.fileno()
        os.set_blocking(pipe, False)
        outgoing = memoryview(json.dumps(message).encode() + b"\n")
        for _ in self._when_ready(pipe, selectors.EVENT_WRITE, limit_s):
            try:
                outgoing = outgoing[os.write(pipe, outgoing) :]
            except BrokenPipeError:
                raise self._died("crashed") from None
            if not outgoing:
                return

    def _receive(self, limit_s: float) -> Any:
        """Read one JSON line within `limit_s` seconds. Raises: _ChildDied, with the child gone."""
        if self._process is None:
            raise _ChildDied("crashed")
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        incoming = bytearray()
        for _ in self._when_ready(pipe, selectors.EVENT_READ, limit_s):
            chunk = os.read(pipe, 1 << 20)
            incoming += chunk
            if not chunk:
                raise self._died("crashed")
            if len(incoming) > ANSWER_BYTES:
                raise self._died(f"wrote more than {ANSWER_BYTES >> 20} MiB")
            if chunk.endswith(b"\n"):
                break
        return json.loads(incoming)

    def _when_ready(self, pipe: int, event: int, limit_s: float) -> Iterator[None]:
        """Goes on whenever the pipe can be used. Raises: _ChildDied after `limit_s` seconds, with the child gone."""
        deadline = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, event)
            while (left := deadline - time.monotonic()) > 0:
                if selector.select(left):
                    yield
        raise self._died(f"did not finish within {limit_s:g} s")

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
