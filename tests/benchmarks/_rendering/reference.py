"""What transformers renders for a row, and what is trained of it by the marks of a template with `{% generation %}`."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from tests.benchmarks._rendering import families
from tests.benchmarks._rendering.conversations import Message, Row
from tests.benchmarks._rendering.marked_templates import marked_template
from tests.benchmarks._rendering.turns import Span, merged, turns

# Characters before a turn that find its place in the text of the generation prompt.
_HEADER_CHARS = 8


@dataclass(frozen=True)
class Prompt:
    """The start of a turn that the generation prompt has written. `whole`: the turn has all of what it writes."""

    span: Span
    whole: bool


@dataclass(frozen=True)
class Marks:
    """The trained spans of a text by a template's marks.

    `prompts` and `row_prompts`: what the generation prompt writes of each trained turn, with the template's defaults
    and with the row's `chat_template_kwargs`. `stops`: tokens after a span that end generation.
    """

    spans: tuple[Span, ...]
    prompts: tuple[Prompt, ...] = ()
    row_prompts: tuple[Prompt, ...] = ()
    stops: tuple[Span, ...] = ()

    @property
    def generated(self) -> tuple[Span, ...]:
        """The spans without what the generation prompt writes, with the stop tokens."""
        return tuple(merged([*_without(self.spans, [prompt.span for prompt in self.prompts]), *self.stops]))


@dataclass(frozen=True)
class Reference:
    """A row by transformers. `trl`, `own`: marks of TRL's training template and of the family's marked copy.

    None where there is no such template or where it renders another text. `other_ids`: of the same row with its
    arguments as objects, where the template prints braces around the text of the arguments.
    """

    text: str
    ids: tuple[int, ...]
    offsets: tuple[Span, ...]
    trl: Marks | None
    own: Marks | None
    other_ids: tuple[int, ...] | None = None

    @property
    def copy_agrees(self) -> bool | None:
        """Whether TRL and the marked copy mark the same, up to the generation prompt; None without one of them."""
        return None if self.trl is None or self.own is None else self.trl.generated == self.own.generated


class NotRendered(Exception):
    """transformers does not render the row."""


@dataclass
class Family:
    """A template family with its model directory, and the references of rows."""

    name: str
    model_dir: Path
    special: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    wants_parts: bool = False
    _tokenizer: Any = None
    _offsets: Tokenizer = field(default=None)

    def __post_init__(self) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(self.model_dir)
        self._offsets = Tokenizer.from_file(str(self.model_dir / "tokenizer.json"))
        added = self._offsets.get_added_tokens_decoder().values()
        self.special = tuple(token.content for token in added if token.special)
        tokens = families.tokens_of(self.name)
        self.stops = (tokens.eos, *tokens.stops)
        self.wants_parts = not self._prints("Words", "Words") and self._prints(_parts("Words"), "Words")

    def as_sent(self, row: Row) -> Row:
        """The row as a user of this family sends it: with texts in parts where the template reads only parts."""
        if not self.wants_parts:
            return row
        messages = [
            {**message, "content": _parts(message["content"])} if isinstance(message.get("content"), str) else message
            for message in row["messages"]
        ]
        return {**row, "messages": messages}

    def reference(self, row: Row) -> Reference:
        """Raises: NotRendered."""
        row, text, other = self._form(row)
        ids = self._ids(row)
        encoding = self._offsets.encode(text, add_special_tokens=False)
        assert tuple(encoding.ids) == ids, "the tokenizer of transformers and tokenizers agree"
        training, own = families.training_template(self.name), marked_template(self.name)
        return Reference(
            text,
            ids,
            tuple(encoding.offsets),
            self._marks(training, row, text, encoding.offsets),
            self._marks(own, row, text, encoding.offsets),
            None if other is None else self._ids(other),
        )

    def text(self, row: Row) -> str:
        """The text that transformers renders for exactly this row. Raises: NotRendered."""
        return str(self._apply(row, tokenize=False))

    def _form(self, row: Row) -> tuple[Row, str, Row | None]:
        """The row in the form that the template reads, its text, and the row with objects where both may be meant."""
        if not self.wants_parts:
            row = {**row, "messages": [_joined(message) for message in row["messages"]]}
        texts = [arguments for arguments in _arguments(row) if isinstance(arguments, str)]
        objects = _with_arguments(row, lambda value: json.loads(value) if isinstance(value, str) else value)
        if texts:
            try:
                text = self.text(row)
                if all(argument in text for argument in texts):
                    return row, text, objects if "{" + texts[0] in text else None
            except NotRendered:
                pass
            return objects, self.text(objects), None
        try:
            return row, self.text(row), None
        except NotRendered:
            if not list(_arguments(row)):
                raise
            as_text = _with_arguments(row, lambda value: json.dumps(value, ensure_ascii=False))
            return as_text, self.text(as_text), None

    def _ids(self, row: Row) -> tuple[int, ...]:
        return tuple(self._apply(row, tokenize=True)["input_ids"])

    def _apply(self, row: Row, tokenize: bool) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                copy.deepcopy(row["messages"]),
                tools=row.get("tools"),
                documents=row.get("documents"),
                tokenize=tokenize,
                **row.get("chat_template_kwargs", {}),
            )
        except Exception as error:  # a template may raise anything
            raise NotRendered(f"{type(error).__name__}: {error}") from None

    def _prints(self, content: Any, words: str) -> bool:
        try:
            return words in self.text({"messages": [{"role": "user", "content": content}]})
        except NotRendered:
            return False

    def _marks(self, template: str | None, row: Row, text: str, tokens: Sequence[Span]) -> Marks | None:
        """The marks of the trained turns; None where the template renders another text."""
        if template is None:
            return None
        try:
            marked_text, blocks = self._render(template, row, row["messages"])
        except Exception:  # a training template may refuse what the family's own template renders
            return None
        if marked_text != text:
            return None
        spans, prompts, row_prompts = [], [], []
        by_message = turns(row["messages"], blocks, lambda messages: self._render(template, row, messages))
        for index, turn in by_message.items():
            if row["messages"][index].get("weight") == 0:
                continue
            spans += [self._without_line_break(text, span) for span in turn]
            prompts += self._prompt({**row, "chat_template_kwargs": {}}, index, text[: turn[0][1]], turn[0][0], tokens)
            row_prompts += self._prompt(row, index, text[: turn[0][1]], turn[0][0], tokens)
        return Marks(tuple(spans), tuple(prompts), tuple(row_prompts), tuple(self._stops_after(text, spans)))

    def _render(
        self, template: str, row: Row, messages: Sequence[Message], prompt: bool = False
    ) -> tuple[str, list[Span]]:
        (text,), blocks = render_jinja_template(
            conversations=[[{k: v for k, v in message.items() if v is not None} for message in messages]],
            tools=row.get("tools"),
            documents=row.get("documents"),
            chat_template=template,
            return_assistant_tokens_mask=not prompt,
            add_generation_prompt=prompt,
            **{**self._tokenizer.special_tokens_map, **row.get("chat_template_kwargs", {})},
        )
        return text, [block for spans in blocks for block in spans]

    def _prompt(self, row: Row, index: int, text: str, start: int, tokens: Sequence[Span]) -> list[Prompt]:
        """What the generation prompt before message `index` writes of the text at `start`; empty without any."""
        try:
            written, _ = self._render(families.template(self.name), row, row["messages"][:index], prompt=True)
        except Exception:  # a template may refuse the conversation before a turn
            return []
        header = text[max(0, start - _HEADER_CHARS) : start]
        place = written.rfind(header)
        rest = "" if place < 0 else written[place + len(header) :]
        common = len(os.path.commonprefix([rest, text[start:]]))  # noqa: RUF071 - characters are meant
        end = start + common
        if whole := common == len(rest):
            return [Prompt((start, end), whole)] if common else []
        # The prompt goes on otherwise: whole tokens are in both.
        end = max((last for _, last in tokens if last <= end), default=0)
        return [Prompt((start, end), whole)] if end > start else []

    def _without_line_break(self, text: str, span: Span) -> Span:
        """The span up to its last token that ends a turn, if only white space follows that token."""
        start, end = span
        body = text[start:end].rstrip()
        return (start, start + len(body)) if body.endswith(self.special) else span

    def _stops_after(self, text: str, spans: Sequence[Span]) -> Iterator[Span]:
        for start, end in spans:
            stop = next((stop for stop in self.stops if text.startswith(stop, end)), None)
            if stop is not None and not text[start:end].endswith(self.special):
                yield end, end + len(stop)
            elif stop == "<|tool_response>":
                # The stop token of Gemma 4's calls, which end with a special token of their own.
                yield end, end + len(stop)


def _without(spans: Sequence[Span], removed: Sequence[Span]) -> Iterator[Span]:
    """The spans without their starts that are in `removed`."""
    ends = dict(removed)
    for start, end in spans:
        if (first := max(start, ends.get(start, start))) < end:
            yield first, end


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _joined(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": "".join(part["text"] for part in content)} if isinstance(content, list) else message


def _arguments(row: Row) -> Iterator[Any]:
    for message in row["messages"]:
        for call in message.get("tool_calls") or ():
            yield call["function"]["arguments"]


def _with_arguments(row: Row, change: Callable[[Any], Any]) -> Row:
    changed = copy.deepcopy(row)
    for message in changed["messages"]:
        for call in message.get("tool_calls") or ():
            call["function"]["arguments"] = change(call["function"]["arguments"])
    return changed
