"""The characters of a rendered conversation that the model generates: its trained answers.

Three methods locate an answer: the template's own `{% generation %}` blocks; the text after the rendered beginning of
the conversation with the generation prompt; and, for templates that rewrite earlier turns, the marks of its fields
(`field_marks`) between the texts that the template writes before and after a turn.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from qlora_service.data.rendering.chat_template import (
    ChatTemplate,
    Conversation,
    Message,
    Span,
    TemplateError,
    reasoning,
)
from qlora_service.data.rendering.field_marks import TAG, Field, MarkedConversation, Unmarkable
from qlora_service.data.rows.conversation import REASONING_KEYS

_FIELD_KEYS = {"content", "tool_calls", *REASONING_KEYS}


class MessageWarning(NamedTuple):
    """A part of a conversation that is not rendered as given.

    `message` is an index, or None for the row; `pointer` is a JSON pointer into that message or row.
    """

    message: int | None
    pointer: str
    reason: str


@dataclass
class LocatedAnswers:
    """The text of a conversation, the spans of its trained answers, and warnings."""

    text: str
    spans: list[Span] = field(default_factory=list)
    warnings: list[MessageWarning] = field(default_factory=list)


def locate_answers(template: ChatTemplate, conversation: Conversation, trained: Sequence[bool]) -> LocatedAnswers:
    """The rendered conversation; `trained[i]`: whether message i is a trained answer.

    Raises:
        TemplateError: the template refused the conversation, or an answer cannot be located.
    """
    messages = conversation.messages
    text, blocks = template.text_and_blocks(conversation)
    result = LocatedAnswers(text)
    blocks = [(_after_header(text, start, end, template), end) for start, end in blocks]
    spans = _spans_of_blocks(blocks, messages, trained)
    if spans is None:
        spans = {
            index: _span_after_prefix(template, conversation, text, index)
            for index, is_trained in enumerate(trained)
            if is_trained
        }
    has_options = conversation.tools or conversation.documents or conversation.arguments
    is_plain = not has_options and all(_is_plainly_rendered(message, text) for message in messages)
    if is_plain and None not in spans.values():
        result.spans = [span for found in spans.values() if found for span in found]
        return result
    marks = _RenderedMarks.of(template, conversation, text)
    for index, found in spans.items():
        located = found
        if marks is not None and (found is None or not marks.is_rendered(index)):
            located = marks.spans(index)
        if located is None:
            raise TemplateError(
                f"cannot tell which part of the rendered text is the answer in message {index}, and would train a part "
                "of the prompt: import the model with a template that has {% generation %} around the answers"
            )
        result.spans += located
    result.warnings = _unrendered_options(conversation, text, template) if marks is None else marks.warnings(trained)
    return result


class _RenderedMarks:
    """A conversation rendered with marks: which field each part of the text comes from."""

    def __init__(self, template: ChatTemplate, conversation: Conversation, marked: MarkedConversation) -> None:
        self._template = template
        self._conversation = conversation.with_messages(marked.messages)
        self._marked = marked
        self._text = template.text(self._conversation)
        self._runs = self._runs_in(self._text)

    @classmethod
    def of(cls, template: ChatTemplate, conversation: Conversation, text: str) -> _RenderedMarks | None:
        """None where the template gives the marked conversation another structure."""
        try:
            rendered = cls(template, conversation, MarkedConversation.of(conversation.messages, text))
        except (TemplateError, Unmarkable):
            return None
        return rendered if rendered._has_structure_of(text) else None

    def spans(self, index: int) -> list[Span] | None:
        """The spans of an answer, empty where the template renders nothing of it; None where they cannot be located."""
        through = self._beginning(index + 1)
        own = self._own_runs(index, through)
        if not own:
            return None if self.is_rendered(index) else []
        parts: list[list[_Run]] = [[]]
        for place, run in enumerate(own):
            # A tool's result between two parts of an answer: the template writes the answer's words after it.
            if place and run.place > own[place - 1].place + 1:
                parts.append([])
            parts[-1].append(run)
        return [
            (
                self._start(index, part[0]) if place == 0 else self._start_of_field(part[0]),
                self._end(part[-1], through if part is parts[-1] else self._through_part(index, part)),
            )
            for place, part in enumerate(parts)
        ]

    def is_rendered(self, index: int) -> bool:
        """Whether the template renders anything of a message."""
        return any(run.message == index for run in self._runs)

    def warnings(self, trained: Sequence[bool]) -> list[MessageWarning]:
        """The fields that the template leaves out, whole or in part, and the tools that it does not render."""
        rendered: dict[Field, int] = {}
        for run in self._runs:
            rendered[run.field] = rendered.get(run.field, 0) + run.end - run.start
        warnings = []
        for entry in self._marked.fields.values():
            reason = _loss(entry, rendered.get(entry, 0), self._conversation.messages, trained)
            if reason is not None:
                warnings.append(MessageWarning(entry.message, entry.pointer, reason))
        return warnings + _unrendered_options(self._conversation, self._text, self._template)

    def _has_structure_of(self, text: str) -> bool:
        if len(text) != len(self._text):
            return False
        end = 0
        for run in self._runs:
            if text[end : run.start] != self._text[end : run.start]:
                return False
            end = run.end
        return text[end:] == self._text[end:]

    def _runs_in(self, text: str) -> list[_Run]:
        return [
            _Run(place, match.start(), match.end(), self._marked.fields[match[1]])
            for place, match in enumerate(self._marked.find_marks(text))
        ]

    def _end_of_last_run(self, text: str) -> int:
        return max((match.end() for match in self._marked.find_marks(text)), default=0)

    def _beginning(self, messages: int, add_generation_prompt: bool = False) -> str:
        """The first messages, rendered with marks; empty where the template refuses them."""
        if messages == len(self._conversation.messages) and not add_generation_prompt:
            return self._text
        beginning = self._conversation.with_messages(self._conversation.messages[:messages])
        try:
            return self._template.text(beginning, add_generation_prompt)
        except TemplateError:
            return ""

    def _own_runs(self, index: int, through: str) -> list[_Run]:
        """The runs of a message, without those that a later turn repeats, such as a function's name in its result."""
        allowed: dict[Field, int] = {}
        for run in self._runs_in(through):
            allowed[run.field] = allowed.get(run.field, 0) + run.end - run.start
        own = []
        for run in self._runs:
            if run.message != index:
                continue
            allowed[run.field] = allowed.get(run.field, 0) - (run.end - run.start)
            if not through or allowed[run.field] >= 0:
                own.append(run)
        return own

    def _start(self, index: int, first: _Run) -> int:
        """The end of what the template writes before an answer: the generation prompt, as far as it is in the text."""
        prompt = self._beginning(index, add_generation_prompt=True)
        prompt = prompt[self._end_of_last_run(prompt) :]
        before = self._runs[first.place - 1].end if first.place else 0
        start = before + _common_length(prompt, self._text[before : first.start])
        # The end of a tool's result may be written with the next turn, before its header.
        end = self._start_of_field(first)
        header = self._template.header.strip()
        place = self._text.rfind(header, start, end) if header else -1
        return _after_header(self._text, max(start, place), end, self._template)

    def _start_of_field(self, first: _Run) -> int:
        """The start of a field's text, which may lie before its first mark."""
        start = first.start - len(first.field.lead)
        return start if self._text.startswith(first.field.lead, start) else first.start

    def _end(self, last: _Run, through: str) -> int:
        """The end of what the template writes after an answer: as in `through`, which ends with the answer.

        Where the answer ends otherwise when turns follow it, as with <|end|> for <|return|>, it ends with that tag.
        """
        after = self._runs[last.place + 1].start if last.place + 1 < len(self._runs) else len(self._text)
        closing = through[self._end_of_last_run(through) :]
        end = last.end + _common_length(closing, self._text[last.end : after])
        if through and end == last.end + len(closing):
            return end
        words_end = last.end + len(_common_prefix(last.field.trail, self._text[last.end : after]))
        tag = TAG.search(self._text, words_end, after)
        is_end = tag is not None and not self._template.header.startswith(tag[0])
        return max(end, tag.end()) if tag is not None and is_end else end

    def _through_part(self, index: int, part: Sequence[_Run]) -> str:
        """The conversation through an answer that has only the fields of this part."""
        rendered = {run.field.pointer.split("/")[1] for run in part}
        message = self._conversation.messages[index]
        shortened = {key: value for key, value in message.items() if key in rendered or key not in _FIELD_KEYS}
        messages = [*self._conversation.messages[:index], shortened]
        try:
            return self._template.text(self._conversation.with_messages(messages))
        except TemplateError:
            return ""


@dataclass(frozen=True)
class _Run:
    """A run of one mark in a text, and its place among the runs."""

    place: int
    start: int
    end: int
    field: Field

    @property
    def message(self) -> int:
        return self.field.message


def _spans_of_blocks(
    blocks: Sequence[Span], messages: Sequence[Message], trained: Sequence[bool]
) -> dict[int, list[Span] | None] | None:
    """The generation blocks of each trained answer; None where they cannot be assigned to the answers."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not blocks:
        return None
    if len(blocks) == len(answers):
        return {index: [block] for index, block in zip(answers, blocks, strict=True) if trained[index]}
    if answers and answers == [index for index, is_trained in enumerate(trained) if is_trained]:
        return {index: [*blocks] if index == answers[0] else [] for index in answers}
    return None


def _span_after_prefix(template: ChatTemplate, conversation: Conversation, text: str, index: int) -> list[Span] | None:
    """The span of the answer where the conversation up to it, and through it, are prefixes of the text."""
    messages = conversation.messages
    try:
        before = template.text(conversation.with_messages(messages[:index]), add_generation_prompt=True)
        is_last = index + 1 == len(messages)
        through = text if is_last else template.text(conversation.with_messages(messages[: index + 1]))
    except TemplateError:
        return None
    start = _after_header(text, len(before), len(through), template)
    is_prefix = text.startswith(through) and through.startswith(before) and start < len(through)
    return [(start, len(through))] if is_prefix else None


def _after_header(text: str, start: int, end: int, template: ChatTemplate) -> int:
    """The end of an answer's header at `start`: templates that write it need not write it as a generation prompt.

    White space before the header and after it may differ from that of the generation prompt.
    """
    header = template.header.strip()
    match = re.compile(r"\s*" + re.escape(header)).match(text, start, end)
    if not header or match is None or text[:start].rstrip().endswith(header):
        return start
    return match.end() + len(_common_prefix(template.header[len(template.header.rstrip()) :], text[match.end() : end]))


def _is_plainly_rendered(message: Message, text: str) -> bool:
    """Whether the text certainly contains all that the message says."""
    content = message.get("content") or ""
    is_plain = isinstance(content, str) and not message.get("tool_calls") and reasoning(message) is None
    return is_plain and content.strip() in text


def _loss(entry: Field, rendered: int, messages: Sequence[Message], trained: Sequence[bool]) -> str | None:
    """A warning about the part of a field that the template leaves out; None where it renders all of it."""
    if rendered >= entry.marks:
        return None
    what, advice = "the message", "use a template that renders it"
    if entry.pointer.startswith("/tool_calls"):
        what = "the tool call" if entry.pointer.endswith("/name") else "the arguments of the tool call"
        advice = "import the model with a template that renders tool calls"
    elif not entry.pointer.startswith("/content") or "</think>" in str(messages[entry.message]["content"]):
        what = "the thought in the message"
        advice = "give it as reasoning_content, or use a template that renders thoughts"
        if any(message["role"] == "assistant" for message in messages[entry.message + 1 :]):
            advice = "templates of thinking models show the last answer's thought only; end a row with each thought"
    elif rendered:
        what = "a part of the message"
    consequence = "which is not trained" if trained[entry.message] else "which the model does not see"
    return f"the chat template leaves out {what}, {consequence}: {advice}"


def _unrendered_options(conversation: Conversation, text: str, template: ChatTemplate) -> list[MessageWarning]:
    """The tools, documents and variables of a row that do not reach the text."""
    reasons = [
        (f"/tools/{place}", "the chat template does not render this tool: the model does not see it")
        for place, tool in enumerate(conversation.tools or ())
        if "tools" not in template.variables or ((name := _tool_name(tool)) and name not in text)
    ]
    reasons += [
        (f"/documents/{place}", "the chat template does not render this document: the model does not see it")
        for place, document in enumerate(conversation.documents or ())
        if "documents" not in template.variables
        or not any(isinstance(value, str) and value.strip() in text for value in document.values())
    ]
    reasons += [
        (f"/chat_template_kwargs/{name}", f"the chat template has no variable {name}: it changes nothing")
        for name in conversation.arguments or ()
        if name not in template.variables
    ]
    return [MessageWarning(None, pointer, reason) for pointer, reason in reasons]


def _tool_name(tool: Any) -> str | None:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _common_length(expected: str, text: str) -> int:
    """The length of the common beginning; a tag of `expected` that the text does not have in full is not in it."""
    common = len(_common_prefix(expected, text))
    for tag in TAG.finditer(expected):
        if tag.start() < common < tag.end():
            return tag.start()
    return common


def _common_prefix(first: str, second: str) -> str:
    return os.path.commonprefix([first, second])  # noqa: RUF071 - characters are meant
