"""Hostile templates are killed, and cost nobody else's row."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from qlora_service.data import template_process
from qlora_service.data.examples import Chat
from qlora_service.data.template_process import TemplateProcess
from qlora_service.errors import InvalidModel

NOW = datetime(2026, 3, 1, tzinfo=UTC)
PLAIN = "{% for m in messages %}{{ m.content }}|{% endfor %}"


def chat(question: str) -> Chat:
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": "answer"})
    return Chat(messages, (False, True))


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "BATCH_S", 2.0)
    monkeypatch.setattr(template_process, "ROW_S", 0.5)


def test_conversations_are_rendered_in_order() -> None:
    with TemplateProcess(PLAIN, {}, NOW) as templates:
        results = templates.render([chat(f"{index} 你好") for index in range(200)])
    assert [result.text for result in results] == [f"{index} 你好|answer|" for index in range(200)]
    assert all(result.text[slice(*result.spans[0])] == "answer|" for result in results)


@pytest.mark.usefixtures("short_limits")
def test_a_row_that_hangs_the_template_is_named_and_the_others_are_rendered() -> None:
    hang = "{% if 'hang' in messages[0].content %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    template = hang + "{% endfor %}{% endif %}" + PLAIN
    with TemplateProcess(template, {}, NOW) as templates:
        results = templates.render([chat("one"), chat("hang"), chat("three")])
    assert [result.text for result in results] == ["one|answer|", "", "three|answer|"]
    assert "did not finish within" in str(results[1].error)


@pytest.mark.usefixtures("short_limits")
def test_a_template_that_always_hangs_is_refused() -> None:
    template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with (
        TemplateProcess(template, {}, NOW) as templates,
        pytest.raises(InvalidModel, match="cannot be used"),
    ):
        templates.render([chat(str(index)) for index in range(5)])


@pytest.mark.usefixtures("short_limits")
@pytest.mark.parametrize("bomb", ["{{ 'x' * 10**9 }}", "{{ 'x' * (2 * 10**9) }}", "{{ '%099999999d' | format(1) }}"])
def test_a_template_that_floods_is_stopped(bomb: str) -> None:
    # Jinja computes constants while it compiles: some bombs go off then, some when a row is rendered.
    with TemplateProcess(bomb + PLAIN, {}, NOW) as templates:
        try:
            problem = templates.render([chat("one")])[0].error
        except InvalidModel as refused:
            problem = refused.message
    assert problem
    assert "template" in problem


def test_a_template_sees_nothing_of_the_services_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_SECRET", "canary")
    with TemplateProcess(PLAIN, {}, NOW) as templates:
        templates.render([chat("one")])
        assert templates._process is not None
        environment = Path(f"/proc/{templates._process.pid}/environ").read_bytes()
    assert b"canary" not in environment


def test_leaving_the_context_ends_the_child() -> None:
    with TemplateProcess(PLAIN, {}, NOW) as templates:
        templates.render([chat("one")])
        assert templates._process is not None
        pid = templates._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_tool_call_arguments_reach_the_template_as_objects() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": [1, 2]}'}}
    messages = ({"role": "user", "content": "go"}, {"role": "assistant", "content": None, "tool_calls": [call]})
    template = (
        "{% for m in messages %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    with TemplateProcess(template, {}, NOW) as templates:
        (result,) = templates.render([Chat(messages, (False, True))])
    assert result.text == 'go{"a": [1, 2]}'
    assert messages[1]["tool_calls"] == [call]
