"""The text that a chat template renders."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from qlora_service.data.rendering.chat_template import ChatTemplate, Conversation, TemplateError

NOW = datetime(2026, 3, 1, tzinfo=UTC)
TWO_TURNS = (
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "yo"},
)


def text(template: str, messages: tuple[dict[str, Any], ...] = TWO_TURNS, **options: Any) -> str:
    return ChatTemplate(template, {"eos_token": "</s>"}, NOW).text(Conversation(messages, **options))


def test_tools_reach_the_template() -> None:
    template = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert text(template, tools=[{"name": "é"}]).startswith('[{"name": "é"}]')


def test_template_receives_the_time_of_the_job() -> None:
    assert text("{{ strftime_now('%d %b %Y') }}") == "01 Mar 2026"


def test_documents_and_variables_of_the_row_reach_the_template() -> None:
    template = "{{ documents[0].text }}{{ style }}{{ eos_token }}"
    assert text(template, documents=[{"text": "a"}], arguments={"style": "b"}) == "ab</s>"
    assert text(template, documents=[{"text": "a"}], arguments={"style": "b", "eos_token": "!"}) == "ab!"


def test_null_keys_do_not_reach_the_template() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": None}
    assert text("{% for m in messages %}{{ m | tojson }}{% endfor %}", (message,)) == '{"role": "assistant"}'


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_has_the_names_that_templates_read(key: str) -> None:
    template = "{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}"
    assert text(template, ({"role": "assistant", "content": "2", key: "one and one"},)) == "one and one|one and one"


def test_the_first_of_two_thoughts_is_the_content_of_reasoning_content() -> None:
    message = {"role": "assistant", "thinking": "second", "reasoning": "third"}
    assert text("{{ messages[0].reasoning_content }}|{{ messages[0].reasoning }}", (message,)) == "second|third"


def test_header_is_what_the_generation_prompt_adds() -> None:
    chatml = "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    assert ChatTemplate(chatml, {}, NOW).header == "A:"
    assert ChatTemplate("{{ raise_exception('no') }}", {}, NOW).header == ""


def test_template_may_refuse_a_conversation() -> None:
    with pytest.raises(TemplateError, match="roles must alternate"):
        text("{{ raise_exception('roles must alternate') }}")


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
        text(escape)


def test_template_that_does_not_compile_is_refused() -> None:
    with pytest.raises(TemplateError, match="does not compile"):
        ChatTemplate("{% if %}", {}, NOW)


def test_blocks_are_trimmed_as_in_transformers() -> None:
    assert text("{% for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}") == "x\n" * 4
