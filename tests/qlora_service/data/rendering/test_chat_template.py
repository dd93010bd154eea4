"""Spans of the trained answers in the text that a chat template renders."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from qlora_service.data.rendering.chat_template import ChatTemplate, TemplateError

NOW = datetime(2026, 3, 1, tzinfo=UTC)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As in Qwen3 and DeepSeek-R1: earlier turns lose their reasoning, so a rendered prefix is not a prefix of the text.
REWRITES_EARLIER_TURNS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ 'A:' + ('' if not loop.last else '<think></think>') + m.content + '</s>' }}"
    "{% else %}{{ 'U:' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
MARKS_GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}U:{{ m.content }}{% endif %}{% endfor %}"
)
TWO_TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "yo"},
]


def answers(template: str, trained: list[bool], messages: list[dict[str, str]] = TWO_TURNS) -> list[str]:
    """The text of each trained answer's span."""
    text, spans = ChatTemplate(template, {}, NOW).render(messages, trained, None)
    return [text[start:end] for start, end in spans]


def test_answer_is_the_text_after_the_generation_prompt() -> None:
    assert answers(CHATML, [False, True, False, True]) == ["yo<|im_end|>\n", "yo<|im_end|>\n"]


def test_equal_answers_are_distinguished() -> None:
    text, spans = ChatTemplate(CHATML, {}, NOW).render(TWO_TURNS, [False, False, False, True], None)
    assert text[spans[0][0] :] == "yo<|im_end|>\n"
    assert spans[0][0] > text.index("and?")


def test_answer_is_located_where_earlier_turns_are_rewritten() -> None:
    assert answers(REWRITES_EARLIER_TURNS, [False, True, False, False]) == ["yo"]
    assert answers(REWRITES_EARLIER_TURNS, [False, False, False, True]) == ["<think></think>yo</s>"]


def test_generation_blocks_are_the_spans() -> None:
    assert answers(MARKS_GENERATION, [False, True, False, True]) == ["yo</s>", "yo</s>"]
    text, spans = ChatTemplate(MARKS_GENERATION, {}, NOW).render(TWO_TURNS, [False, False, False, True], None)
    assert text == "U:hiA:yo</s>U:and?A:yo</s>"
    assert spans == [(20, 26)]


def test_generation_blocks_survive_a_filter_around_them() -> None:
    template = "{% filter trim %}  " + MARKS_GENERATION + "{% endfilter %}"
    assert answers(template, [False, True, False, True]) == ["yo</s>", "yo</s>"]


def test_answer_that_a_template_omits_is_an_error() -> None:
    with pytest.raises(TemplateError, match="which part"):
        answers("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", [False, True, False, False])


def test_answer_repeated_elsewhere_by_the_template_is_not_guessed() -> None:
    template = "{{ messages[-1].content }}|{% for m in messages %}{{ m.content }};{% endfor %}"
    with pytest.raises(TemplateError, match="which part"):
        answers(template, [False, False, False, True])


def test_tool_call_without_content_is_trained() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}"
        "{% endif %};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    call = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": None, "tool_calls": call}]
    text, spans = ChatTemplate(template, {}, NOW).render(messages, [False, True], None)
    assert text[spans[0][0] : spans[0][1]] == ('[{"type": "function", "function": {"name": "f", "arguments": "{}"}}];')


def test_tools_reach_the_template() -> None:
    template = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    text, _ = ChatTemplate(template, {}, NOW).render(TWO_TURNS, [False] * 4, [{"name": "é"}])
    assert text.startswith('[{"name": "é"}]')


def test_template_receives_the_time_of_the_job() -> None:
    text, _ = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, NOW).render(TWO_TURNS, [False] * 4, None)
    assert text == "01 Mar 2026"


def test_template_may_refuse_a_conversation() -> None:
    with pytest.raises(TemplateError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}, NOW).render(TWO_TURNS, [False] * 4, None)


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    ],
)
def test_sandbox_refuses_escapes(escape: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(escape, {}, NOW).render(TWO_TURNS, [False] * 4, None)


def test_template_that_does_not_compile_is_refused() -> None:
    with pytest.raises(TemplateError, match="does not compile"):
        ChatTemplate("{% if %}", {}, NOW)


def test_blocks_are_trimmed_as_in_transformers() -> None:
    text, _ = ChatTemplate("{% for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}", {}, NOW).render(
        TWO_TURNS, [False] * 4, None
    )
    assert text == "x\n" * 4


def test_answer_repeated_elsewhere_is_not_guessed_where_the_surrounding_text_changes() -> None:
    template = "{{ messages[-1].content | length }}|{% for m in messages %}{{ m.content }};{% endfor %}x"
    with pytest.raises(TemplateError, match="which part"):
        answers(
            template.replace("{% for", "{% if messages[-1].content == 'yo' %}!{% endif %}{% for"),
            [False, False, False, True],
        )
