"""Marked conversations: their letters are replaced by characters that tell, in the rendered text, where they come from.

Each text field of a message (content, reasoning, the name and the arguments of each tool call) has its own mark, a
private-use character. The template's structure stays as it is, because everything that templates look for is kept:
lengths, white space, punctuation, and tags such as `</think>` or `[TOOL_CALLS]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from qlora_service.data.rendering.chat_template import Message, reasoning
from qlora_service.data.rows.conversation import REASONING_KEYS

TAG = re.compile(r"(<[^<>\s][^<>]{0,60}>|\[/?[A-Z_]+\])")
"""Text that a template may look for, and that may be a special token"""
# The Supplementary Private Use Area-A has no meaning in templates.
_FIRST_MARK, _LAST_MARK = 0xF0000, 0xFFFFD
_MARKS = re.compile(f"([{chr(_FIRST_MARK)}-{chr(_LAST_MARK)}])\\1*")
_LETTER = re.compile(r"[^\W_]|[^\x00-\x7f\s]")
_VISIBLE = re.compile(r"\S")
_JSON_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_JSON_ESCAPE = re.compile(r"(\\u[0-9a-fA-F]{4}|\\.)")


class Unmarkable(Exception):
    """The conversation has more fields than there are marks."""


@dataclass(frozen=True)
class Field:
    """A text field: the index of its message, its JSON pointer in the message, and the number of its marks.

    `lead` and `trail` are its characters before the first mark and after the last one, without white space around.
    """

    message: int
    pointer: str
    marks: int
    lead: str = ""
    trail: str = ""


class MarkedConversation:
    """The messages with marks, and the field of each mark in `fields`."""

    def __init__(self, text: str) -> None:
        self.messages: list[Message] = []
        self.fields: dict[str, Field] = {}
        present = set(_MARKS.findall(text))
        self._unused = (mark for mark in map(chr, range(_FIRST_MARK, _LAST_MARK + 1)) if mark not in present)

    @classmethod
    def of(cls, messages: Iterable[Message], text: str) -> MarkedConversation:
        """The messages with marks that `text`, their rendering, does not contain. Raises: Unmarkable."""
        marked = cls(text)
        for index, message in enumerate(messages):
            marked.messages.append(marked._message(index, message))
        return marked

    def find_marks(self, text: str) -> Iterator[re.Match[str]]:
        """The runs of one mark in a text."""
        return (match for match in _MARKS.finditer(text) if match[1] in self.fields)

    def _message(self, index: int, message: Message) -> Message:
        result = dict(message)
        content = message.get("content")
        if isinstance(content, str):
            result["content"] = self._text(index, "/content", content)
        elif isinstance(content, list):
            result["content"] = [self._part(index, f"/content/{place}", part) for place, part in enumerate(content)]
        if isinstance(thought := reasoning(message), str):
            used = next(key for key in REASONING_KEYS if message.get(key) is not None)
            marked = self._text(index, f"/{used}", thought)
            # Templates read any of the names; transformers' aliases are equal texts.
            result |= {key: marked for key in REASONING_KEYS if message.get(key) == thought}
        if isinstance(message.get("tool_calls"), list):
            result["tool_calls"] = [
                self._call(index, f"/tool_calls/{position}", call)
                for position, call in enumerate(message["tool_calls"])
            ]
        return result

    def _call(self, index: int, pointer: str, call: Any) -> Any:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            return call
        marked = dict(function)
        if isinstance(function.get("name"), str):
            marked["name"] = self._text(index, f"{pointer}/function/name", function["name"])
        if function.get("arguments"):
            mark = self._next_mark()
            marked["arguments"] = _mark_arguments(function["arguments"], mark)
            count = _count(marked["arguments"], mark)
            self.fields[mark] = Field(index, f"{pointer}/function/arguments", count)
        return {**call, "function": marked}

    def _part(self, index: int, pointer: str, part: Any) -> Any:
        text = part.get("text") if isinstance(part, dict) else None
        return {**part, "text": self._text(index, f"{pointer}/text", text)} if isinstance(text, str) else part

    def _text(self, index: int, pointer: str, text: str) -> str:
        mark = self._next_mark()
        marked = mark_text(text, mark)
        lead, trail = marked[: max(0, marked.find(mark))].lstrip(), marked[marked.rfind(mark) + 1 :].rstrip()
        self.fields[mark] = Field(index, pointer, marked.count(mark), lead, trail)
        return marked

    def _next_mark(self) -> str:
        mark = next(self._unused, None)
        if mark is None:
            raise Unmarkable
        return mark


def mark_text(text: str, mark: str) -> str:
    """The text with marks for its letters and digits; tags are kept, unless the text is nothing but tags."""
    pieces = TAG.split(text)
    # Odd pieces are tags.
    marked = [piece if place % 2 else _mark_piece(piece, mark) for place, piece in enumerate(pieces)]
    result = "".join(marked)
    return result if mark in result else _LETTER.sub(mark, text)


def _mark_piece(piece: str, mark: str) -> str:
    marked, count = _LETTER.subn(mark, piece)
    return marked if count else _VISIBLE.sub(mark, piece)


def _mark_arguments(value: Any, mark: str) -> Any:
    """Arguments with marks in their strings. The keys of an object are kept: templates sort and look them up."""
    if isinstance(value, str):
        return _JSON_STRING.sub(lambda literal: f'"{_mark_literal(literal[1], mark)}"', value)
    return _mark_leaves(value, mark)


def _mark_literal(literal: str, mark: str) -> str:
    """A JSON string's source with marks; escape sequences are kept."""
    pieces = _JSON_ESCAPE.split(literal)
    return "".join(piece if place % 2 else mark_text(piece, mark) for place, piece in enumerate(pieces))


def _mark_leaves(value: Any, mark: str) -> Any:
    if isinstance(value, str):
        return mark_text(value, mark)
    if isinstance(value, dict):
        return {key: _mark_leaves(entry, mark) for key, entry in value.items()}
    return [_mark_leaves(entry, mark) for entry in value] if isinstance(value, list) else value


def _count(value: Any, mark: str) -> int:
    if isinstance(value, str):
        return value.count(mark)
    if isinstance(value, dict):
        return sum(_count(entry, mark) for entry in value.values())
    return sum(_count(entry, mark) for entry in value) if isinstance(value, list) else 0
