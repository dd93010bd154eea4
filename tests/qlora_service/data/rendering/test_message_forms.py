"""The forms of arguments and contents that a template renders."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from qlora_service.data.rendering.chat_template import ChatTemplate
from qlora_service.data.rendering.message_forms import (
    ArgumentForm,
    required_argument_form,
    requires_parts,
    with_arguments_as,
    with_parts,
)

NOW = datetime(2026, 3, 1, tzinfo=UTC)
START = "{% for m in messages %}{% for c in m.tool_calls or [] %}{% set a = c.function.arguments %}"
END = "{% endfor %}{{ m.content }}{% endfor %}"


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {}, NOW)


@pytest.mark.parametrize(
    ("part", "form"),
    [
        ("{{ a | tojson }}", "object"),
        ("{% for k, v in a | items %}{{ k }}={{ v }}{% endfor %}", "object"),
        ("{% if a is string %}{{ '{' + a + '}' }}{% else %}{{ a | tojson }}{% endif %}", "object"),
        ("{{ '```json' + a }}", "text"),
        ("{{ a }}", "text"),
        ("{% if a is string %}{{ a }}{% else %}{{ a | tojson }}{% endif %}", None),
        ("", None),
    ],
)
def test_arguments_have_the_form_that_the_template_renders_right(part: str, form: ArgumentForm | None) -> None:
    assert required_argument_form(template(START + part + END)) == form


def test_a_template_that_accepts_only_calls_with_results_is_sampled_with_them() -> None:
    strict = "{% if messages[-1].tool_calls %}{{ raise_exception('no result') }}{% endif %}"
    assert required_argument_form(template(strict + START + "{{ a | tojson }}" + END)) == "object"


def test_contents_are_parts_only_where_text_is_not_rendered() -> None:
    parts = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    assert requires_parts(template(parts))
    assert not requires_parts(template("{% for m in messages %}{{ m.content }}{% endfor %}"))
    assert not requires_parts(template("nothing"))


def test_messages_are_converted_to_a_form() -> None:
    def message(arguments: Any) -> dict[str, Any]:
        return {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}]}

    assert with_arguments_as("object", message('{"é": 1}')) == message({"é": 1})
    assert with_arguments_as("text", message({"é": 1})) == message('{"é": 1}')
    assert with_arguments_as("object", message("not JSON")) == message("not JSON")
    assert with_arguments_as("object", message(None)) == message(None)
    assert with_parts({"role": "user", "content": "a"})["content"] == [{"type": "text", "text": "a"}]
    assert with_parts({"role": "assistant"}) == {"role": "assistant"}
