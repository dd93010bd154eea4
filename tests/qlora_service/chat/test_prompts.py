"""Prompts, compared with the rendering of transformers and with training rows."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qlora_service.chat.prompts import MAX_TEMPLATE_PROCESSES, Prompts
from qlora_service.data.rendering.renderer import RenderedRow, Renderer, RenderRules
from qlora_service.data.rows.examples import Chat, Completion, SourceRow
from qlora_service.errors import InvalidModel, InvalidRequest
from tests.tiny_model import CHATML, build_tiny_model
from tests.unknown_tokens import build_model_with_unknown_tokens

pytestmark = pytest.mark.slow

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}]
NOW = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture(scope="module")
def prompts(tiny_model: Path) -> Iterator[Prompts]:
    with Prompts(tiny_model) as prompts:
        yield prompts


def training_row(model_dir: Path, example: Any) -> RenderedRow:
    with Renderer(model_dir, RenderRules(1000, prompt_format="plain"), NOW) as renderer:
        (row,) = renderer.render([SourceRow(example, 1, None)])
    assert isinstance(row, RenderedRow)
    return row


def before_answer(row: RenderedRow) -> list[int]:
    return list(row.input_ids[: row.trained.index(True)])


def test_prompt_equals_the_rendering_of_transformers(prompts: Prompts, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    expected = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(prompts.chat(QUESTION, None).ids) == expected


def test_template_that_renders_no_answers_is_refused(tmp_path: Path) -> None:
    questions = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    model = build_tiny_model(tmp_path / "model", chat_template=questions)
    with Prompts(model) as prompts, pytest.raises(InvalidModel, match="renders no answers"):
        prompts.chat(QUESTION, None)


@pytest.mark.parametrize("chat_template", [CHATML, None])
def test_prompt_equals_the_training_prefix(chat_template: str | None, tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "model", chat_template=chat_template)
    row = training_row(model, Chat((*QUESTION, {"role": "assistant", "content": "Paris."}), (False, False, True)))
    with Prompts(model) as prompts:
        prompt = prompts.chat(QUESTION, None)
    assert list(prompt.ids) == before_answer(row)
    assert row.input_ids[len(row.input_ids) - 1 - row.trained[::-1].index(True)] in prompt.stop_ids


def test_plain_text_prompt_equals_the_training_prefix(tiny_model: Path, prompts: Prompts) -> None:
    row = training_row(tiny_model, Completion("The capital of France is", " Paris."))
    assert list(prompts.text("The capital of France is").ids) == before_answer(row)


def test_token_that_ends_a_turn_is_a_stop_token_besides_eos(prompts: Prompts) -> None:
    template = CHATML.replace("<|im_end|>", "<|endoftext|>")
    stops = {prompts.tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert prompts.chat(QUESTION, None, template).stop_ids == stops
    assert prompts.chat(QUESTION, None).stop_ids == {prompts.tokenizer.token_to_id("<|im_end|>")}


def test_template_of_an_adapter_is_used(prompts: Prompts) -> None:
    template = (
        "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    text = prompts.tokenizer.decode(list(prompts.chat(QUESTION, None, template).ids))
    assert text == "[system] Be brief.\n[user] What is the capital of France?\n[assistant] "


def test_tools_reach_the_template(prompts: Prompts) -> None:
    template = "{{ tools | tojson }}{% for message in messages %}|{{ message.content }}{% endfor %}"
    tools = [{"type": "function", "function": {"name": "now"}}]
    text = prompts.tokenizer.decode(list(prompts.chat(QUESTION, tools, template).ids))
    assert text.startswith('[{"type": "function", "function": {"name": "now"}}]|Be brief.')


def test_conversation_that_the_template_refuses_is_an_invalid_request(prompts: Prompts) -> None:
    template = "{{ raise_exception('no system message, please') }}"
    with pytest.raises(InvalidRequest, match="no system message, please") as refused:
        prompts.chat(QUESTION, None, template)
    assert refused.value.location == "messages"


def test_template_processes_are_limited_and_follow_the_date(tiny_model: Path) -> None:
    now = NOW
    template = "{{ strftime_now('%d %b') }}{% for message in messages %} {{ message.content }}{% endfor %}"
    with Prompts(tiny_model, lambda: now) as prompts:
        assert prompts.tokenizer.decode(list(prompts.chat(QUESTION, None, template).ids)).startswith("02 Jan")
        now = datetime(2026, 1, 3, tzinfo=UTC)
        assert prompts.tokenizer.decode(list(prompts.chat(QUESTION, None, template).ids)).startswith("03 Jan")
        children = {process._process for process in prompts._processes.values()}
        for number in range(MAX_TEMPLATE_PROCESSES + 1):
            prompts.chat(QUESTION, None, f"{number}{template}")
        assert len(prompts._processes) == MAX_TEMPLATE_PROCESSES
        # The processes of evicted templates have ended.
        assert [child is not None and child.poll() is not None for child in children] == [True, True]


def test_prompt_with_a_token_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    rows = build_model_with_unknown_tokens(tmp_path / "model")
    message = f"token {rows} .<.ticket.>., and the base has embeddings for {rows} tokens"
    with Prompts(tmp_path / "model", embeddings=rows) as prompts:
        with pytest.raises(InvalidRequest, match=message) as refused:
            prompts.chat([{"role": "user", "content": "A <|ticket|>"}], None)
        assert refused.value.location == "messages"
        with pytest.raises(InvalidRequest, match=message) as refused:
            prompts.text("A <|ticket|>")
        assert refused.value.location == "prompt"
        assert prompts.text("A ticket").ids
