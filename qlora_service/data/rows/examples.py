"""What a training row is, whatever file and shape it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_service.specs import Container, Shape

__all__ = [
    "Chat",
    "Completion",
    "Container",
    "Document",
    "Example",
    "Labelled",
    "Preference",
    "Shape",
    "SourceRow",
    "Text",
    "documents",
]


@dataclass(frozen=True)
class Chat:
    """A conversation in OpenAI's form.

    Each message is a dict with `role` (system, user, assistant, tool), `content` (a string, or None next to
    `tool_calls`) and whatever of `name`, `tool_calls`, `tool_call_id`, `reasoning_content` the row had. `trained[i]`
    says whether message i is learned: assistant messages whose `weight` was 1 or absent.
    """

    messages: tuple[dict[str, Any], ...]
    trained: tuple[bool, ...]
    tools: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True)
class Completion:
    """Plain text in two parts; only the completion and the stop token are learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """Plain text; every token is learned."""

    text: str


@dataclass(frozen=True)
class Preference:
    """Two answers to the same conversation, of which the first is better; of each, only the answer is learned from."""

    chosen: Chat | Completion
    rejected: Chat | Completion


@dataclass(frozen=True)
class Labelled:
    """An answer that is wanted, or not."""

    answer: Chat | Completion
    desirable: bool


Document = Chat | Completion | Text
"""What becomes one sequence of tokens."""
Example = Document | Preference | Labelled


def documents(example: Example) -> tuple[Document, ...]:
    """The one document of an example, or the two of a pair, the chosen one first."""
    match example:
        case Preference(chosen, rejected):
            return (chosen, rejected)
        case Labelled(answer):
            return (answer,)
        case _:
            return (example,)


@dataclass(frozen=True)
class SourceRow:
    """An example and where it stands in the upload (see `errors.Finding` for `line`)."""

    example: Example
    line: int
    byte_offset: int | None
