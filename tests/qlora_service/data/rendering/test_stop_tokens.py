"""Tokens that end an answer, of rows rendered by real templates."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from qlora_service.data.rendering.renderer import RenderedRow, Renderer, RenderRules, UnusableRow
from qlora_service.data.rendering.stop_tokens import StopTokens, TrainedEnds, directory_stop_ids
from qlora_service.data.rows.examples import Chat, Completion, Document, SourceRow, Text
from tests.tiny_model import CHATML

NOW = datetime(2026, 1, 2, tzinfo=UTC)
QUESTION = {"role": "user", "content": "How many days?"}
ANSWER = {"role": "assistant", "content": "There are seven."}
CHAT = Chat((QUESTION, ANSWER), (False, True))
LONG_CHAT = Chat((QUESTION, ANSWER, QUESTION, ANSWER), (False, True, False, True))
# As gpt-oss: <|end|> after a thought and after answers of earlier turns, <|return|> and <|call|> at the end of a turn.
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>"
    "{% if m.role == 'assistant' and m.thought %}{{ m.thought }}<|end|><|start|>assistant<|message|>{% endif %}"
    "{{ m.content }}{% if m.call %}<|call|>{% elif m.role == 'assistant' and loop.last %}<|return|>"
    "{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
)
CHANNEL_TOKENS = ["<|start|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"]
HEADINGS = (
    "{% for m in messages %}{% if m.role == 'user' %}\n### Instruction\n{% else %}\n### Response\n{% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}\n### Response\n{% endif %}"
)


def model_with(
    source: Path,
    to: Path,
    *,
    eos: str | None = "<|endoftext|>",
    template: str = CHATML,
    special: tuple[str, ...] = (),
    added: tuple[str, ...] = (),
) -> Path:
    """A copy of the tiny model's settings with another eos token, another template, and more tokens."""
    to.mkdir()
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(list(added))
    tokenizer.save(str(to / "tokenizer.json"))
    (to / "chat_template.jinja").write_text(template)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (to / name).write_text(json.dumps(settings | {"eos_token": eos} if name == "tokenizer_config.json" else {}))
    token_id = None if eos is None else tokenizer.token_to_id(eos)
    (to / "generation_config.json").write_text(json.dumps({"eos_token_id": token_id}))
    return to


def stop_tokens(model: Path, *documents: Document, limit: int = 512, **rules: Any) -> StopTokens:
    """The stop tokens after rendering the documents, all of which are usable."""
    with Renderer(model, RenderRules(limit, **rules), NOW) as renderer:
        results = list(renderer.render([SourceRow(document, 1, None) for document in documents]))
        assert not any(isinstance(result, UnusableRow) for result in results)
        return renderer.stop_tokens()


def token_id(model: Path, token: str) -> int:
    found: int = Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id(token)
    return found


@pytest.mark.parametrize("train_on", ["assistant", "all"])
@pytest.mark.parametrize("chat", [CHAT, LONG_CHAT])
def test_a_turns_end_is_found_before_the_line_break_of_the_template(
    chat: Chat, train_on: str, tiny_model: Path, tmp_path: Path
) -> None:
    model = model_with(tiny_model, tmp_path / "model")
    end, eos = token_id(model, "<|im_end|>"), token_id(model, "<|endoftext|>")
    stops = stop_tokens(model, chat, train_on=train_on)
    assert stops == StopTokens({"<|im_end|>": end}, {"<|endoftext|>": eos}, {"<|im_end|>": end}, "<|im_end|>")
    assert stops.ids == (end, eos)


def test_an_end_that_stops_the_base_already_leaves_its_eos(tiny_model: Path) -> None:
    stops = stop_tokens(tiny_model, CHAT)
    assert list(stops.trained) == list(stops.base) == list(stops.template) == ["<|im_end|>"]
    assert stops.eos is None


def test_a_template_that_writes_the_eos_token_keeps_it(tiny_model: Path, tmp_path: Path) -> None:
    template = "{% if false %}{{ eos_token }}{% endif %}" + CHATML
    stops = stop_tokens(model_with(tiny_model, tmp_path / "model", template=template), CHAT)
    assert list(stops.trained) == ["<|im_end|>"]
    assert stops.eos is None


def test_of_several_closing_tokens_the_last_before_white_space_ends_an_answer(tiny_model: Path, tmp_path: Path) -> None:
    """Cohere's templates write two; Phi-3's one and, in a line of its own, the eos token."""
    template = CHATML.replace("<|im_end|>", "</answer><|im_end|>") + "{{ eos_token if not add_generation_prompt }}"
    stops = stop_tokens(model_with(tiny_model, tmp_path / "model", template=template, special=("</answer>",)), CHAT)
    assert list(stops.template) == ["<|im_end|>"]


def test_every_token_that_ends_a_turn_is_an_end(tiny_model: Path, tmp_path: Path) -> None:
    model = model_with(tiny_model, tmp_path / "model", template=CHANNELS, special=tuple(CHANNEL_TOKENS))
    call = Chat((QUESTION, ANSWER | {"call": True}), (False, True))
    stops = stop_tokens(model, CHAT, CHAT, call)
    assert list(stops.trained) == ["<|return|>", "<|call|>"]
    assert list(stops.template) == ["<|return|>"]


def test_ends_of_earlier_turns_count_unless_answers_go_on_after_them(tiny_model: Path) -> None:
    ends = TrainedEnds(Tokenizer.from_file(str(tiny_model / "tokenizer.json")), frozenset({9}))
    ends.add([5, 6, 1, 7, 5, 6, 9, 8], [False, True, True, False, False, True, True, False], is_cut=False)
    assert ends.ids() == [9, 1]
    ends.add([5, 6, 1, 6, 9], [False, True, True, True, True], is_cut=False)
    assert ends.ids() == [9]


def test_a_token_that_stands_inside_answers_ends_none(tiny_model: Path, tmp_path: Path) -> None:
    model = model_with(tiny_model, tmp_path / "model", template=CHANNELS, special=tuple(CHANNEL_TOKENS))
    thought = Chat((QUESTION, ANSWER | {"thought": "A week, then."}), (False, True))
    assert list(stop_tokens(model, LONG_CHAT, thought).trained) == ["<|return|>"]


def test_an_answer_that_quotes_the_end_token_does_not_hide_it(tiny_model: Path, tmp_path: Path) -> None:
    model = model_with(tiny_model, tmp_path / "model")
    quote = Chat((QUESTION, {"role": "assistant", "content": "ChatML writes <|im_end|> there."}), (False, True))
    assert list(stop_tokens(model, CHAT, CHAT, quote).trained) == ["<|im_end|>"]


def test_ordinary_text_at_the_end_of_turns_is_no_end(tiny_model: Path, tmp_path: Path) -> None:
    model = model_with(tiny_model, tmp_path / "model", eos=None, template=HEADINGS)
    assert stop_tokens(model, LONG_CHAT) == StopTokens({}, {}, {}, None)
    assert stop_tokens(model, Text("Once upon a time")) == StopTokens({}, {}, {}, None)
    assert stop_tokens(model, Completion("One, two,", " three")).ids == ()


def test_an_answer_without_a_base_that_stops_ends_with_the_templates_token(tiny_model: Path, tmp_path: Path) -> None:
    stops = stop_tokens(model_with(tiny_model, tmp_path / "model", eos=None), CHAT)
    assert (list(stops.trained), stops.base, stops.eos) == (["<|im_end|>"], {}, "<|im_end|>")


@pytest.mark.parametrize("document", [Completion("One, two,", " three"), Text("Once upon a time")])
def test_plain_text_ends_with_the_eos_token(document: Document, tiny_model: Path, tmp_path: Path) -> None:
    stops = stop_tokens(model_with(tiny_model, tmp_path / "model"), document, prompt_format="plain")
    assert list(stops.trained) == list(stops.base) == ["<|endoftext|>"]
    assert list(stops.template) == ["<|im_end|>"]
    assert stops.eos is None


def test_truncated_rows_have_no_end(tiny_model: Path, tmp_path: Path) -> None:
    model = model_with(tiny_model, tmp_path / "model")
    with Renderer(model, RenderRules(512), NOW) as renderer:
        (whole,) = renderer.render([SourceRow(CHAT, 1, None)])
    assert isinstance(whole, RenderedRow)
    start = whole.trained.index(True)
    for length in range(start + 1, start + whole.trained_tokens):
        stops = stop_tokens(model, CHAT, limit=length, too_long="truncate")
        assert stops.trained == {}
        assert stops.ids == (token_id(model, "<|im_end|>"), token_id(model, "<|endoftext|>"))
    assert list(stop_tokens(model, CHAT, Text("Once"), limit=length, too_long="truncate").trained) == ["<|endoftext|>"]


def test_a_row_cut_after_an_added_token_has_no_end(tiny_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    ends = TrainedEnds(tokenizer, frozenset())
    ends.add([5, 6, 1], [False, True, True], is_cut=True)
    assert ends.ids() == []
    ends.add([5, 6, 1], [False, True, True], is_cut=False)
    ends.add([5, 6, 2, 7], [False, True, True, False], is_cut=True)
    assert ends.ids() == [1, 2]


def test_added_tokens_that_are_not_special_end_rows_only(tiny_model: Path, tmp_path: Path) -> None:
    template = CHATML.replace("'<|im_end|>' + '\n'", "('</call>' if message['call'] else '<end>')")
    model = model_with(tiny_model, tmp_path / "model", eos=None, template=template, added=("</call>", "<end>"))
    chat = Chat((QUESTION, ANSWER | {"call": True}, QUESTION, ANSWER), (False, True, False, True))
    assert list(stop_tokens(model, chat).trained) == ["<end>"]


def test_rows_of_text_need_no_usable_template(tiny_model: Path, tmp_path: Path) -> None:
    for number, template in enumerate(["{% if %}", "{{ raise_exception('no') }}", "{{ messages[9].content }}"]):
        model = model_with(tiny_model, tmp_path / f"{number}", template=template)
        stops = stop_tokens(model, Text("Once upon a time"))
        assert (list(stops.trained), stops.template) == (["<|endoftext|>"], {})


def test_stop_tokens_of_a_directory_are_those_of_its_settings(tiny_model: Path, tmp_path: Path) -> None:
    model = model_with(tiny_model, tmp_path / "model")
    im_end, eos = token_id(model, "<|im_end|>"), token_id(model, "<|endoftext|>")
    assert directory_stop_ids(model) == {eos}
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [im_end, 7]}))
    assert directory_stop_ids(model) == {eos, im_end, 7}
    shutil.copyfile(model / "special_tokens_map.json", model / "tokenizer_config.json")  # names no token
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": im_end}))
    assert directory_stop_ids(model) == {im_end}
