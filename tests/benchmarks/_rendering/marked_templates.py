"""Copies of the families' own templates with `{% generation %}` put in, for rows that TRL's templates render otherwise.

A copy is the installed template with the replacements below. The marks hold everything that the model generates in an
assistant turn: thoughts, words, calls and the end token, without the header that the generation prompt writes.
"""

# ruff: noqa: RUF001 - full-width characters are meant

from __future__ import annotations

from dataclasses import dataclass

from tests.benchmarks._rendering.families import template

_OPEN, _CLOSE = "{%- generation -%}", "{%- endgeneration -%}"


@dataclass(frozen=True)
class Replacement:
    """`old` becomes `new` in exactly `count` places."""

    old: str
    new: str
    count: int = 1


def marked_template(name: str) -> str | None:
    """The family's own template with marks; None where the table has no replacements for the family.

    Raises:
        ValueError: a snippet is not in the installed template as often as the table says.
    """
    text = template(name)
    if name in _ALREADY_MARKED:
        return text
    if name not in _REPLACEMENTS:
        return None
    for replacement in _REPLACEMENTS[name]:
        if (found := text.count(replacement.old)) != replacement.count:
            raise ValueError(f"{name}: {found} times {replacement.old!r}, not {replacement.count} times")
        text = text.replace(replacement.old, replacement.new)
    return text


def _wrapped(text: str) -> str:
    return _OPEN + text + _CLOSE


def _before(text: str, addition: str, count: int = 1) -> Replacement:
    return Replacement(text, addition + text, count)


def _after(text: str, addition: str, count: int = 1) -> Replacement:
    return Replacement(text, text + addition, count)


def _around(text: str, count: int = 1) -> Replacement:
    return Replacement(text, _wrapped(text), count)


def _qwen3(condition: str, plain_answers: int) -> tuple[Replacement, ...]:
    """One header before the branches of the thought, and the marks around these branches and the calls."""
    header = "'<|im_start|>' + message.role + '\\n"
    return (
        _before(f"{{%- if {condition} %}}", "{{- " + header + "' }}" + _OPEN),
        Replacement(header + "<think>", "'<think>"),
        Replacement("{{- " + header + "' + content }}", "{{- content }}", plain_answers),
        Replacement(_QWEN_TURN_END, _QWEN_TURN_END.replace("}}", "}}" + _CLOSE, 1)),
    )


def _llama3_1(call_headers: int) -> tuple[Replacement, ...]:
    header = "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}"
    words = "message['content'] | trim + '<|eot_id|>' }}"
    return (
        Replacement(
            f"\\n\\n'+ {words}",
            "\\n\\n' }}{%- if message['role'] == 'assistant' -%}"
            + _wrapped("{{- " + words)
            + "{%- else -%}{{- "
            + words
            + "{%- endif -%}",
        ),
        Replacement(header, "", call_headers),
        _after("{%- set tool_call = message.tool_calls[0].function %}", header + _OPEN),
        _before('{%- elif message.role == "tool" or', _CLOSE),
    )


def _gemma4(calls: str, words: tuple[Replacement, ...]) -> tuple[Replacement, ...]:
    """As TRL's marks for DiffusionGemma: results inside a turn stay outside the marks."""
    turn_end = "\n            {{- '<turn|>\\n' -}}"
    return (
        _before(f"{{%- for tool_call in message{calls} -%}}", _OPEN),
        _before("{%- set ns.prev_message_type = 'tool_call' -%}", _CLOSE),
        *words,
        Replacement(
            turn_end,
            "{%- if role == 'model' -%}" + _wrapped(turn_end) + "{%- else -%}" + turn_end + "{%- endif -%}",
        ),
    )


_QWEN_TURN_END = "{{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\" %}"
_QWEN_LATER = "loop.index0 > ns.last_query_index"
_GEMMA4_THOUGHT = _around("{{- '<|channel>thought\\n' + thinking_text + '\\n<channel|>' -}}")
_GEMMA4_CAPTURED = Replacement(
    "{{- captured_content -}}",
    "{%- if role == 'model' -%}"
    + _wrapped("{{- captured_content -}}")
    + "{%- else -%}{{- captured_content -}}{%- endif -%}",
)
_GEMMA4_WORDS = (
    _around("{{- strip_thinking(message['content']) -}}"),
    _around("{{- strip_thinking(item['text']) -}}"),
)
_DEEPSEEK_END = " + '<｜end▁of▁sentence｜>'}}"
_DEEPSEEK_ANSWERS = (
    Replacement(
        "{{'<｜tool▁outputs▁end｜>' + message['content']" + _DEEPSEEK_END,
        "{{'<｜tool▁outputs▁end｜>'}}" + _wrapped("{{message['content']" + _DEEPSEEK_END),
    ),
    Replacement(
        "{{'<｜Assistant｜>' + content" + _DEEPSEEK_END,
        "{{'<｜Assistant｜>'}}" + _wrapped("{{content" + _DEEPSEEK_END),
    ),
)

# The template has marks of its own.
_ALREADY_MARKED = frozenset({"lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"})
_REPLACEMENTS: dict[str, tuple[Replacement, ...]] = {
    "qwen3": _qwen3(_QWEN_LATER, plain_answers=2),
    "qwen3_5_nothink": _qwen3(_QWEN_LATER, plain_answers=1),
    "qwen3_5_think": _qwen3(_QWEN_LATER, plain_answers=1),
    "qwen3_6": _qwen3(
        f"(preserve_thinking is defined and preserve_thinking is true) or ({_QWEN_LATER})", plain_answers=1
    ),
    "qwen3_8": _qwen3(f"preserve_thinking is undefined or preserve_thinking is true or {_QWEN_LATER}", plain_answers=1),
    "cohere2": (
        _around("{{ message['content'] }}<|END_RESPONSE|>"),
        Replacement(
            "{% endif %}<|END_OF_TURN_TOKEN|>{% endfor %}",
            "{% endif %}{% if role == 'assistant' %}"
            + _wrapped("<|END_OF_TURN_TOKEN|>")
            + "{% else %}<|END_OF_TURN_TOKEN|>{% endif %}{% endfor %}",
        ),
    ),
    "glm4moe": (
        _before("{%- if loop.index0 > ns.last_user_index and reasoning_content -%}", _OPEN),
        _before("{%- elif m.role == 'tool' -%}", _CLOSE),
    ),
    "llama3_1": _llama3_1(call_headers=2),
    "llama3_2": _llama3_1(call_headers=1),
    "gemma4": _gemma4("['tool_calls']", (_GEMMA4_THOUGHT, _GEMMA4_CAPTURED)),
    "gemma4_v2": _gemma4("['tool_calls']", _GEMMA4_WORDS),
    "gemma4_v3": _gemma4("['tool_calls']", (_GEMMA4_THOUGHT, *_GEMMA4_WORDS)),
    "gemma4_v4": _gemma4("['tool_calls']", (_GEMMA4_THOUGHT, _GEMMA4_CAPTURED)),
    "gemma4_v5": _gemma4(".get('tool_calls')", (_GEMMA4_THOUGHT, _GEMMA4_CAPTURED)),
    "diffusion_gemma": _gemma4(".get('tool_calls')", (_GEMMA4_THOUGHT, _GEMMA4_CAPTURED)),
    "deepseek_r1_distill": _DEEPSEEK_ANSWERS,
    "deepseekv3": (
        *_DEEPSEEK_ANSWERS,
        Replacement(
            "{{'<｜Assistant｜>' + message['content'] + '<｜tool▁calls▁begin｜>",
            "{{'<｜Assistant｜>'}}" + _OPEN + "{{message['content'] + '<｜tool▁calls▁begin｜>",
        ),
        Replacement(
            "{{'<｜Assistant｜><｜tool▁calls▁begin｜>", "{{'<｜Assistant｜>'}}" + _OPEN + "{{'<｜tool▁calls▁begin｜>"
        ),
        _before("{{'\\n' + '<｜tool▁call▁begin｜>'", _OPEN),
        _after("'<｜tool▁call▁end｜>'}}", _CLOSE, count=3),
        _around("{{'<｜tool▁calls▁end｜><｜end▁of▁sentence｜>'}}"),
    ),
}
