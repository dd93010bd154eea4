"""Hostile templates are killed, without an effect on other rows."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from qlora_service.data.rendering import template_process
from qlora_service.data.rendering.template_process import TemplateProcess
from qlora_service.data.rows.examples import Chat
from qlora_service.errors import InvalidDataset, InvalidModel

pytestmark = pytest.mark.slow

NOW = datetime(2026, 3, 1, tzinfo=UTC)
HANG = (
    "{% if 'hang' in messages[0].content %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.content }}|{% endfor %}"


def chat(question: str) -> Chat:
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": "answer"})
    return Chat(messages, (False, True))


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "BATCH_LIMIT_S", 2.0)
    monkeypatch.setattr(template_process, "ROW_LIMIT_S", 0.5)


def test_conversations_are_rendered_in_order() -> None:
    with TemplateProcess(PLAIN, {}, NOW) as templates:
        results = list(templates.render([chat(f"{index} 你好") for index in range(200)]))
    assert [result.text for result in results] == [f"{index} 你好|answer|" for index in range(200)]
    assert all(result.text[slice(*result.spans[0])] == "answer|" for result in results)


@pytest.mark.usefixtures("short_limits")
def test_row_that_hangs_the_template_is_an_error_and_the_others_are_rendered() -> None:
    with TemplateProcess(HANG + PLAIN, {}, NOW) as templates:
        results = list(templates.render([chat("one"), chat("hang"), chat("three")]))
    assert [result.text for result in results] == ["one|answer|", "", "three|answer|"]
    assert "did not finish within" in str(results[1].error)


@pytest.mark.usefixtures("short_limits")
def test_template_that_always_hangs_is_refused() -> None:
    template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with (
        TemplateProcess(template, {}, NOW) as templates,
        pytest.raises(InvalidModel, match="cannot be used"),
    ):
        list(templates.render([chat(str(index)) for index in range(5)]))


@pytest.mark.usefixtures("short_limits")
def test_hanging_rows_among_others_are_errors_until_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(template_process, "BATCH_LIMIT_S", 0.5)
    monkeypatch.setattr(template_process, "MAX_FAILURES", 4)
    with TemplateProcess(HANG + PLAIN, {}, NOW) as templates:
        results = templates.render([chat(question) for question in ["hang", "fine"] * 3])
        assert [bool(result.error) for result in results] == [True, False] * 3
        with pytest.raises(InvalidDataset, match="split the longest conversations"):
            templates.render([chat("hang"), chat("fine")])


@pytest.mark.parametrize("others", [[], ["hang"]], ids=["in its batch", "alone after another hung"])
def test_long_conversation_has_more_time_than_a_short_one(monkeypatch: pytest.MonkeyPatch, others: list[str]) -> None:
    # Without marks, an answer is located by rendering the messages before it: 400 answers, 801 renderings.
    turns = Chat(chat("a question").messages * 400, (False, True) * 400)
    for name, limit_s in {"BATCH_LIMIT_S": 0.02, "ROW_LIMIT_S": 0.02, "MAX_EXTRA_S": 2.0}.items():
        monkeypatch.setattr(template_process, name, limit_s)
    with TemplateProcess(HANG + PLAIN, {}, NOW) as templates:
        templates._start()
        assert templates._process is not None
        pid = templates._process.pid
        *_, result = templates.render([*map(chat, others), turns])
        assert (templates._process.pid == pid) is not bool(others)
    assert result.error is None
    assert len(result.spans) == 400


@contextmanager
def serving(template: str, cpu_s: float) -> Iterator[subprocess.Popen[bytes]]:
    """The child process after compiling the template, without a parent that watches it."""
    setup = {"template": template, "special_tokens": {}, "now": NOW.isoformat(), "cpu_s": cpu_s}
    with subprocess.Popen(
        [sys.executable, "-m", "qlora_service.data.rendering.template_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert exchange(process, setup | {"memory_bytes": 1 << 30, "row_chars": 1000}) == {"ready": True}
        yield process
        process.kill()


def exchange(process: subprocess.Popen[bytes], message: dict[str, Any]) -> Any:
    send(process, message)
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def send(process: subprocess.Popen[bytes], message: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(message).encode() + b"\n")
    process.stdin.flush()


def batch(question: str, cpu_s: float) -> dict[str, Any]:
    row = chat(question)
    return {"rows": [[row.messages, row.trained, None]], "cpu_s": cpu_s}


def test_kernel_ends_a_hung_child_without_a_parent() -> None:
    with serving(HANG + PLAIN, cpu_s=20) as process:
        send(process, batch("hang", cpu_s=1))
        assert process.wait(timeout=60) == -signal.SIGXCPU


def test_each_batch_has_its_own_processor_time() -> None:
    work = "{% for a in range(99999) %}{% for b in range(20) %}{% endfor %}{% endfor %}"
    with serving(work + PLAIN, cpu_s=20) as process:
        limits = set()
        while len(limits) < 3:
            assert exchange(process, batch("fine", cpu_s=20))[0]["text"] == "fine|answer|"
            limits.add(resource.prlimit(process.pid, resource.RLIMIT_CPU)[0])


@pytest.mark.parametrize("surrogate", ["{{ '\\ud800' }}", "{{ raise_exception('\\ud800' * 9999) }}"])
def test_unpaired_surrogate_from_a_template_becomes_a_short_error(surrogate: str) -> None:
    with TemplateProcess(surrogate + PLAIN, {}, NOW) as templates:
        (result,) = templates.render([chat("one")])
    assert result.error is not None
    assert len(result.error.encode()) < 4000


@pytest.mark.usefixtures("short_limits")
@pytest.mark.parametrize("bomb", ["{{ 'x' * 10**9 }}", "{{ 'x' * (2 * 10**9) }}", "{{ '%099999999d' | format(1) }}"])
def test_template_that_exceeds_memory_or_output_is_stopped(bomb: str) -> None:
    # Jinja evaluates constants at compile time: some bombs fail then, others when a row is rendered.
    with TemplateProcess(bomb + PLAIN, {}, NOW) as templates:
        try:
            error = templates.render([chat("one")])[0].error
        except InvalidModel as refusal:
            error = refusal.message
    assert error
    assert "template" in error


def test_child_does_not_inherit_the_environment_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_SECRET", "canary")
    with TemplateProcess(PLAIN, {}, NOW) as templates:
        templates.render([chat("one")])
        assert templates._process is not None
        environment = Path(f"/proc/{templates._process.pid}/environ").read_bytes()
    assert b"canary" not in environment


def test_end_of_the_context_ends_the_child() -> None:
    with TemplateProcess(PLAIN, {}, NOW) as templates:
        templates.render([chat("one")])
        assert templates._process is not None
        pid = templates._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_next_batch_is_rendered_before_it_is_requested() -> None:
    batches = [("first", [chat("one")]), ("none", []), ("last", [chat("two"), chat("three")])]
    sent: list[str] = []

    def send_batches() -> Iterator[tuple[str, list[Chat]]]:
        for name, chats in batches:
            sent.append(name)
            yield name, chats

    with TemplateProcess(PLAIN, {}, NOW) as templates:
        results = templates.render_ahead(send_batches())
        name, (result,) = next(results)
        assert (name, result.text) == ("first", "one|answer|")
        assert sent == ["first", "none"]
        assert [(name, [result.text for result in rendered]) for name, rendered in results] == [
            ("none", []),
            ("last", ["two|answer|", "three|answer|"]),
        ]


def test_child_that_dies_between_two_batches_loses_no_row() -> None:
    with TemplateProcess(PLAIN, {}, NOW) as templates:
        results = templates.render_ahead([(1, [chat("one")]), (2, [chat("two")]), (3, [chat("three")])])
        next(results)
        assert templates._process is not None
        templates._process.kill()
        assert [(item, [result.text for result in rendered]) for item, rendered in results] == [
            (2, ["two|answer|"]),
            (3, ["three|answer|"]),
        ]


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
