"""The assistant message that each `{% generation %}` block of a rendered text comes from."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from tests.benchmarks._rendering.conversations import Message

Span = tuple[int, int]
# A private-use character for each message; none of them is in a conversation or a template.
_FIRST_MARK = 0xE000
# The last letter or digit that is not part of a tag.
_LAST_LETTER = re.compile(r"\w(?=[^\w<>]*(?:<[^<>]*>[^\w<>]*)*$)")
_TEXT_KEYS = ("content", "reasoning_content", "thinking", "reasoning")


def turns(
    messages: Sequence[Message], blocks: Sequence[Span], render: Callable[[Sequence[Message]], tuple[str, list[Span]]]
) -> dict[int, list[Span]]:
    """The blocks of each assistant message by its index, adjacent ones merged.

    `render` gives the text and the blocks of messages; it renders the messages with a mark in each of their texts. A
    block without a mark, such as an end token, belongs to the message of the block that it touches. Where it touches
    none, or the next answer has no mark in the text, it belongs to the next answer.
    """
    marked_text, marked_blocks = render([_marked(message, index) for index, message in enumerate(messages)])
    assert len(marked_blocks) == len(blocks), "a mark in the texts of a message does not change its structure"
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    owned: dict[int, list[Span]] = {}
    owner, end = -1, -1
    for (start, stop), block in zip(marked_blocks, blocks, strict=True):
        if start == stop:
            continue
        marks = [ord(mark) - _FIRST_MARK for mark in re.findall("[\ue000-\uf8ff]", marked_text[start:stop])]
        if marks:
            assert set(marks) == {marks[0]}, "a block holds the texts of one message"
            owner = marks[0]
        elif start != end or (owner + 1 in answers and chr(_FIRST_MARK + owner + 1) not in marked_text):
            owner = next(index for index in answers if index > owner)
        owned.setdefault(owner, []).append(block)
        end = stop
    return {index: merged(spans) for index, spans in owned.items()}


def merged(spans: Sequence[Span]) -> list[Span]:
    """The spans in order, those that touch as one."""
    result: list[Span] = []
    for start, end in sorted(spans):
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], end)
        else:
            result.append((start, end))
    return result


def _marked(message: Message, index: int) -> Message:
    """An assistant message with the mark of its index in its texts and in the names of the functions that it calls."""
    if message["role"] != "assistant":
        return message
    mark = chr(_FIRST_MARK + index)
    changed = {key: _with_mark(message[key], mark) if key in _TEXT_KEYS else message[key] for key in message}
    if message.get("tool_calls"):
        changed["tool_calls"] = [
            {**call, "function": {**call["function"], "name": call["function"]["name"] + mark}}
            for call in message["tool_calls"]
        ]
    return changed


def _with_mark(value: Any, mark: str) -> Any:
    if isinstance(value, list):
        return [{**part, "text": _with_mark(part["text"], mark)} for part in value]
    if not isinstance(value, str) or not value.strip():
        return value
    letter = _LAST_LETTER.search(value)
    place = len(value.rstrip()) if letter is None else letter.end()
    return value[:place] + mark + value[place:]
