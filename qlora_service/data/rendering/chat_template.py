"""Chat templates, rendered as transformers' `apply_chat_template` renders them.

Templates come with the base model and are untrusted programs: they run in Jinja's sandbox, inside a child process
(`template_child`) that its parent can kill. The environment offers the same as transformers' (`tojson`,
`raise_exception`, `strftime_now`, `{% generation %}`, loop controls).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qlora_service.data.rows.conversation import REASONING_KEYS

Message = dict[str, Any]
Span = tuple[int, int]

_REASONING_KEYS = frozenset(REASONING_KEYS)


class TemplateError(Exception):
    """The template refused the conversation, or the answers cannot be located in the rendered text."""


@dataclass(frozen=True)
class Conversation:
    """The input of a template. `arguments` are additional variables; they may replace special tokens."""

    messages: tuple[Message, ...]
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    arguments: dict[str, Any] | None = None

    def with_messages(self, messages: Iterable[Message]) -> Conversation:
        return replace(self, messages=tuple(messages))


class ChatTemplate:
    """A compiled template.

    `special_tokens` are the variables of the template, such as bos_token and eos_token. `now` is the time that
    `strftime_now` formats: fixed, because a job must render the same rows in every attempt.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], now: datetime) -> None:
        self._special_tokens = special_tokens
        nonce = secrets.token_hex(8)
        # Noncharacters around a nonce that the text of a row cannot know.
        self._open, self._close = f"\ufdd0{nonce}\ufdd1", f"\ufdd2{nonce}\ufdd3"
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.extend(generation_marks=(self._open, self._close))
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = now.strftime
        try:
            self._template = environment.from_string(source)
            self.variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
            """Names that the template takes from its caller"""
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template does not compile: {error}") from None

    def text(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        """The rendered text. Raises: TemplateError."""
        return self.text_and_blocks(conversation, add_generation_prompt)[0]

    def text_and_blocks(
        self, conversation: Conversation, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The rendered text and the spans of its `{% generation %}` blocks. Raises: TemplateError."""
        variables = {
            **self._special_tokens,
            **(conversation.arguments or {}),
            "messages": [_as_transformers_passes(message) for message in conversation.messages],
            "tools": conversation.tools,
            "documents": conversation.documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            marked = self._template.render(variables)
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
        ) as error:
            raise TemplateError(f"the chat template refused this conversation: {error}") from None
        return self._strip_marks(marked)

    @cached_property
    def header(self) -> str:
        """What the template writes before an answer: its generation prompt after a user's message."""
        question = {"role": "user", "content": "Hello"}
        # A template for tool use may refuse a conversation without a list of tools.
        for conversation in (Conversation((question,)), Conversation((question,), tools=[])):
            with suppress(TemplateError):
                text, with_header = self.text(conversation), self.text(conversation, add_generation_prompt=True)
                return with_header.removeprefix(text) if with_header.startswith(text) else ""
        return ""

    def _strip_marks(self, marked: str) -> tuple[str, list[Span]]:
        """The text without marks, and the spans between them."""
        pieces, blocks, length = [], [], 0
        for index, part in enumerate(marked.split(self._open)):
            body, close, rest = part.partition(self._close) if index else ("", "", part)
            if close:
                blocks.append((length, length + len(body)))
            pieces += [body, rest]
            length += len(body) + len(rest)
        return "".join(pieces), blocks


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: the template's own marks around the text that the model generates."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        opening, closing = self.environment.generation_marks  # type: ignore[attr-defined]
        return f"{opening}{caller()}{closing}"


def reasoning(message: Message) -> Any:
    """The reasoning of a message under any of its names, or None."""
    return next((message[key] for key in REASONING_KEYS if message.get(key) is not None), None)


def _as_transformers_passes(message: Message) -> Message:
    """The message without null keys, and with its reasoning under the names that templates read.

    Source: transformers 5.23, `apply_chat_template` and `_alias_reasoning_fields`.
    """
    if None not in message.values() and _REASONING_KEYS.isdisjoint(message):
        return message
    message = {key: value for key, value in message.items() if value is not None}
    thought = reasoning(message)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Replaces Jinja's own filter, which escapes HTML; prompts are not HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
