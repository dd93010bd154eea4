"""Chat templates: the text of a conversation, and the character span of each trained answer in it.

Templates come with the base model and are untrusted programs: they run in Jinja's sandbox, inside a child process
(`python -m qlora_service.data.rendering.chat_template`, driven by `template_process`) that its parent can kill.
The environment offers the same as transformers' (`tojson`, `raise_exception`, `strftime_now`, `{% generation %}`,
loop controls), so that a template renders here as it does at inference.
"""

from __future__ import annotations

import json
import math
import os
import resource
import secrets
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, Any]
Span = tuple[int, int]

# Private-use characters without a meaning in tokenizers and templates: they replace an answer in `_differing_region`.
PROBES = ("\ue000", "\ue001")
ERROR_CHARS = 500


class TemplateError(Exception):
    """The template refused the conversation, or the answers cannot be located in the rendered text."""


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
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template does not compile: {error}") from None

    def render(
        self, messages: Sequence[Message], trained: Sequence[bool], tools: Sequence[Any] | None
    ) -> tuple[str, list[Span]]:
        """The text of a conversation, and the character span of every trained message.

        Three methods locate the spans, in this order: the template's own `{% generation %}` blocks; the text after
        the rendered prefix of the conversation with the generation prompt; the region that changes when only that
        answer changes (for templates that rewrite earlier turns).

        Raises:
            TemplateError: the template refused the conversation, or an answer cannot be located.
        """
        text, blocks = self._strip_marks(self._marked_text(messages, tools))
        trained_indices = [index for index, is_trained in enumerate(trained) if is_trained]
        if blocks:
            answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            if len(blocks) == len(answers):
                return text, [block for index, block in zip(answers, blocks, strict=True) if trained[index]]
            if trained_indices == answers:
                return text, blocks
        return text, [self._answer_span(text, messages, index, tools) for index in trained_indices]

    def _answer_span(self, text: str, messages: Sequence[Message], index: int, tools: Sequence[Any] | None) -> Span:
        try:
            before = self._plain_text(messages[:index], tools, add_generation_prompt=True)
            through = text if index + 1 == len(messages) else self._plain_text(messages[: index + 1], tools)
        except TemplateError:
            before, through = "", ""
        if through and text.startswith(through) and through.startswith(before) and len(before) < len(through):
            return len(before), len(through)
        span = self._differing_region(text, messages, index, tools)
        if span is None:
            raise TemplateError(f"cannot tell which part of the rendered text is the answer in message {index}")
        return span

    def _differing_region(
        self, text: str, messages: Sequence[Message], index: int, tools: Sequence[Any] | None
    ) -> Span | None:
        """The region that changes with the content of one message; None where it is not exactly that content."""
        content = messages[index].get("content")
        if not isinstance(content, str):
            return None
        first, second = (
            self._plain_text([*messages[:index], {**messages[index], "content": probe}, *messages[index + 1 :]], tools)
            for probe in PROBES
        )
        start = len(os.path.commonprefix([first, second]))  # noqa: RUF071 - characters are meant
        tail = len(os.path.commonprefix([first[::-1], second[::-1]]))  # noqa: RUF071
        end = len(text) - tail
        same_around = text[:start] == first[:start] and text[end:] == first[len(first) - tail :]
        if same_around and text[start:end].strip() == content.strip():
            return start, end
        return None

    def _plain_text(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, add_generation_prompt: bool = False
    ) -> str:
        return self._strip_marks(self._marked_text(messages, tools, add_generation_prompt))[0]

    def _marked_text(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, add_generation_prompt: bool = False
    ) -> str:
        """The rendered text, with marks around the `{% generation %}` blocks."""
        try:
            return self._template.render(
                messages=list(messages),
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
        ) as error:
            raise TemplateError(f"the chat template refused this conversation: {error}") from None

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


def serve(stdin: Any = sys.stdin, stdout: Any = sys.stdout) -> None:
    """Renders batches of conversations until stdin ends; every request and answer is one JSON line.

    The first line is the setup: template, special_tokens, now, memory_bytes, row_chars, cpu_s. Each further line is a
    batch: rows, a list of [messages, trained, tools], and cpu_s; its answer is a list of {"text", "spans"} or
    {"error"}. A line that takes more than about its cpu_s of processor time ends the process.
    """
    setup = json.loads(stdin.readline())
    resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"], setup["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_cpu(setup["cpu_s"])
    try:
        template = ChatTemplate(setup["template"], setup["special_tokens"], datetime.fromisoformat(setup["now"]))
        answer: Any = {"ready": True}
    except TemplateError as error:
        template, answer = None, {"error": _error_text(error)}
    print(json.dumps(answer), file=stdout, flush=True)
    for line in stdin:
        batch = json.loads(line)
        _limit_cpu(batch["cpu_s"])
        answers = [_render_row(template, row, setup["row_chars"]) for row in batch["rows"]]
        print(json.dumps(answers), file=stdout, flush=True)


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


def _limit_cpu(seconds: float) -> None:
    """Makes the kernel end this process after `seconds` more of processor time, at most a second later.

    The parent kills a template that hangs; if the parent has died, only this limit does.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit_s = math.ceil(usage.ru_utime + usage.ru_stime + seconds)
    _, hard_s = resource.getrlimit(resource.RLIMIT_CPU)
    # The soft limit ends the process too, and can be raised again up to the hard limit.
    soft_s = limit_s if hard_s == resource.RLIM_INFINITY else min(limit_s, hard_s)
    resource.setrlimit(resource.RLIMIT_CPU, (soft_s, hard_s))


def _render_row(template: ChatTemplate | None, row: Any, row_chars: int) -> dict[str, Any]:
    assert template is not None
    try:
        text, spans = template.render(*row)
        text.encode()
    except UnicodeEncodeError:
        return {"error": "the chat template wrote an unpaired surrogate, which is not a character"}
    except TemplateError as error:
        return {"error": _error_text(error)}
    except (MemoryError, RecursionError) as error:
        return {"error": f"the chat template exceeded a limit on this conversation ({type(error).__name__})"}
    if len(text) > row_chars:
        return {"error": f"the chat template rendered this conversation to {len(text)} characters; at most {row_chars}"}
    return {"text": text, "spans": spans}


def _error_text(error: TemplateError) -> str:
    """The error's message, any part of which the template may choose, truncated and in valid UTF-8."""
    return str(error)[:ERROR_CHARS].encode(errors="backslashreplace").decode()


if __name__ == "__main__":
    serve()
