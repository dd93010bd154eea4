"""Training examples: the one form of a row, independent of its container and shape."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qlora_service.errors import Finding
from qlora_service.specs import Container, Shape

__all__ = [
    "Chat",
    "Completion",
    "Container",
    "Document",
    "Example",
    "LabeledAnswer",
    "Preference",
    "Shape",
    "SourceRow",
    "Text",
    "documents",
]


@dataclass(frozen=True)
class Chat:
    """A conversation in OpenAI's form.

    Each message is a dict without nulls: `role`, `content` (a string; absent where the row has none, as next to
    `tool_calls`), `tool_calls`, and every other key as the row has it, because a chat template may read any: among them
    the names of a thought, `reasoning_content`, `thinking` and `reasoning`. The roles are the row's own: a template may
    know developer, function, ipython and others. `trained[i]` says whether message i is trained: assistant messages
    that the row does not exclude (`weight`).
    `tools` are OpenAI's schemas. `documents` and `template_arguments` are what transformers' `apply_chat_template`
    takes: documents for the template, and variables of it, such as `enable_thinking`.
    """

    messages: tuple[dict[str, Any], ...]
    trained: tuple[bool, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    documents: tuple[dict[str, Any], ...] | None = None
    template_arguments: dict[str, Any] | None = None
    text_pointers: tuple[str, ...] = field(default=(), compare=False)
    """The JSON pointer of each message's text in the row"""

    @cached_property
    def characters(self) -> int:
        """Number of characters in all strings, keys excluded."""
        return _characters([self.messages, self.tools, self.documents, self.template_arguments])


@dataclass(frozen=True)
class Completion:
    """Plain text in two parts; only the completion and the stop token are trained."""

    prompt: str
    completion: str

    @property
    def characters(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class Text:
    """Plain text; every token is trained."""

    text: str

    @property
    def characters(self) -> int:
        return len(self.text)


@dataclass(frozen=True)
class Preference:
    """A preference pair: a better and a worse answer to the same prompt. Only the tokens of the answers are trained."""

    chosen: Chat | Completion
    rejected: Chat | Completion


@dataclass(frozen=True)
class LabeledAnswer:
    """An answer with its label: desirable or undesirable."""

    answer: Chat | Completion
    desirable: bool


Document = Chat | Completion | Text
"""The source of one token sequence."""
Example = Document | Preference | LabeledAnswer


def documents(example: Example) -> tuple[Document, ...]:
    """The one document of an example, or the chosen and the rejected document of a preference pair."""
    match example:
        case Preference(chosen, rejected):
            return (chosen, rejected)
        case LabeledAnswer(answer):
            return (answer,)
        case _:
            return (example,)


@dataclass(frozen=True)
class SourceRow:
    """An example and its place in the upload (see `errors.Finding` for `line` and `byte_offset`)."""

    example: Example
    line: int
    byte_offset: int | None
    warnings: tuple[Finding, ...] = ()
    """Parts of the row that are not trained, or not as one would expect"""


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list | tuple) else 0
