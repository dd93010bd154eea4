"""A child process that runs chat templates under limits on time, memory and output."""

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

from qlora_service.data.rendering.answer_spans import MessageWarning
from qlora_service.data.rendering.chat_template import Span
from qlora_service.data.rows.examples import Chat
from qlora_service.errors import InvalidDataset, InvalidModel

Item = TypeVar("Item")

MEMORY_BYTES = 1 << 30
ROW_CHARS = 16 << 20
ANSWER_BYTES = 256 << 20
START_LIMIT_S = 20.0
BATCH_LIMIT_S = 20.0
ROW_LIMIT_S = 5.0
# Long conversations get more time, up to `MAX_EXTRA_S`. Measured with ChatML, the simplest template, on one core:
# 0.4 µs for a message and 1 to 3 ns for a character, each time it is rendered; other templates and busy machines need
# up to 50 times as much.
MESSAGE_S = 20e-6
CHARACTER_S = 100e-9
MAX_EXTRA_S = 60.0
# Consecutive failures are attributed to the template, failures among rows that succeed to the rows.
MAX_CONSECUTIVE_FAILURES = 3
MAX_FAILURES = 20


@dataclass(frozen=True)
class RenderedChat:
    """A conversation's text, the character spans of its trained answers, and warnings; or the error."""

    text: str = ""
    spans: tuple[Span, ...] = ()
    warnings: tuple[MessageWarning, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class _Request:
    """A batch of conversations in the child's form, and the extra seconds that each may take."""

    rows: list[Any]
    extra_s: list[float]

    @property
    def limit_s(self) -> float:
        return BATCH_LIMIT_S + min(sum(self.extra_s), MAX_EXTRA_S)


class _ChildFailed(Exception):
    """The child hung, crashed, or wrote too much, and has been killed. The message is a predicate: `crashed`."""


class TemplateProcess:
    """Renders conversations with one template. A context manager; its child process ends with the context."""

    def __init__(self, template: str, special_tokens: dict[str, str], now: datetime) -> None:
        self._setup = {
            "template": template,
            "special_tokens": special_tokens,
            "now": now.isoformat(),
            "memory_bytes": MEMORY_BYTES,
            "row_chars": ROW_CHARS,
            "cpu_s": START_LIMIT_S,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._failures = 0
        self._consecutive_failures = 0

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
        """For each batch, its item and one result per conversation, in order; renders the next batch in the meantime.

        Raises:
            InvalidModel: the template does not compile, or hangs or crashes on consecutive conversations.
            InvalidDataset: the template hangs or crashes on too many conversations, though not on all.
        """
        pending: tuple[Item, _Request] | None = None
        try:
            for item, chats in batches:
                completed = None if pending is None else (pending[0], self._results(pending[1]))
                pending = item, self._request(chats)
                if completed is not None:
                    yield completed
            if pending is not None:
                item, request = pending
                pending = None
                yield item, self._results(request)
        finally:
            if pending is not None:
                # The unread answer would otherwise be read as the answer to the next batch.
                self._kill()

    def _request(self, chats: Sequence[Chat]) -> _Request:
        """Sends a batch to the child, without waiting for the answer."""
        request = _Request(
            [[chat.messages, chat.trained, chat.tools, chat.documents, chat.template_arguments] for chat in chats],
            [_extra_s(chat) for chat in chats],
        )
        if chats:
            # A failure is handled when the answer is read.
            with contextlib.suppress(_ChildFailed):
                self._send_rows(request.rows, request.limit_s)
        return request

    def _results(self, request: _Request) -> list[RenderedChat]:
        answers: Iterable[dict[str, Any]] = []
        try:
            if request.rows:
                answers = self._receive(request.limit_s)
                self._consecutive_failures = 0
        except _ChildFailed:
            # The template hung or crashed on one conversation: render each alone, so that the others succeed.
            answers = map(self._render_alone, request.rows, request.extra_s)
        return [
            RenderedChat(error=answer["error"])
            if "error" in answer
            else RenderedChat(
                answer["text"],
                tuple((start, end) for start, end in answer["spans"]),
                tuple(MessageWarning(*warning) for warning in answer["warnings"]),
            )
            for answer in answers
        ]

    def _render_alone(self, row: Any, extra_s: float) -> dict[str, Any]:
        try:
            limit_s = ROW_LIMIT_S + min(extra_s, MAX_EXTRA_S)
            self._send_rows([row], limit_s)
            (answer,) = self._receive(limit_s)
            self._consecutive_failures = 0
            return cast("dict[str, Any]", answer)
        except _ChildFailed as failure:
            self._failures += 1
            self._consecutive_failures += 1
            if self._consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
                raise InvalidModel(
                    f"the base model's chat template {failure} on {self._consecutive_failures} conversations in a row: "
                    "it cannot be used; import the model with a working template",
                    location="/base_model",
                ) from None
            if self._failures >= MAX_FAILURES:
                raise InvalidDataset(
                    f"the base model's chat template {failure} on one conversation, after {self._failures - 1} others "
                    "on which it failed: split the longest conversations into shorter ones, or use another base model",
                    location="/dataset",
                ) from None
            return {"error": f"the chat template {failure} on this conversation"}

    def _send_rows(self, rows: list[Any], limit_s: float) -> None:
        if self._process is None:
            self._start()
        self._send({"rows": rows, "cpu_s": limit_s}, limit_s)

    def _start(self) -> None:
        # A minimal environment, so that a template cannot read the service's secrets (keys, tokens).
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qlora_service.data.rendering.template_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                "PYTHONIOENCODING": "utf-8",
            },
        )
        try:
            self._send(self._setup, START_LIMIT_S)
            answer = self._receive(START_LIMIT_S)
        except _ChildFailed as failure:
            raise InvalidModel(
                f"the base model's chat template {failure} while it was compiled", location="/base_model"
            ) from None
        if "error" in answer:
            raise InvalidModel(f"base model: {answer['error']}", location="/base_model")

    def _send(self, message: Any, limit_s: float) -> None:
        """Writes one JSON line within `limit_s` seconds. Raises: _ChildFailed, after killing the child."""
        assert self._process is not None
        assert self._process.stdin is not None
        pipe = self._process.stdin.fileno()
        os.set_blocking(pipe, False)
        outgoing = memoryview(json.dumps(message).encode() + b"\n")
        for _ in self._when_ready(pipe, selectors.EVENT_WRITE, limit_s):
            try:
                outgoing = outgoing[os.write(pipe, outgoing) :]
            except BrokenPipeError:
                raise self._killed("crashed") from None
            if not outgoing:
                return

    def _receive(self, limit_s: float) -> Any:
        """Reads one JSON line within `limit_s` seconds. Raises: _ChildFailed, after killing the child."""
        if self._process is None:
            raise _ChildFailed("crashed")
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        incoming = bytearray()
        for _ in self._when_ready(pipe, selectors.EVENT_READ, limit_s):
            chunk = os.read(pipe, 1 << 20)
            incoming += chunk
            if not chunk:
                raise self._killed("crashed")
            if len(incoming) > ANSWER_BYTES:
                raise self._killed(f"wrote more than {ANSWER_BYTES >> 20} MiB")
            if chunk.endswith(b"\n"):
                break
        return json.loads(incoming)

    def _when_ready(self, pipe: int, event: int, limit_s: float) -> Iterator[None]:
        """Yields each time the pipe is ready. Raises: _ChildFailed after `limit_s` seconds, after killing the child."""
        deadline = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, event)
            while (left := deadline - time.monotonic()) > 0:
                if selector.select(left):
                    yield
        raise self._killed(f"did not finish within {limit_s:g} s")

    def _killed(self, failure: str) -> _ChildFailed:
        self._kill()
        return _ChildFailed(failure)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _extra_s(chat: Chat) -> float:
    """Extra seconds for a long conversation: its template may render the conversation five times for each answer."""
    renderings = 3 + 5 * sum(chat.trained)
    return renderings * (MESSAGE_S * len(chat.messages) + CHARACTER_S * chat.characters)
