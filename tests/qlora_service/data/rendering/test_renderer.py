"""Rows → token ids and trained tokens, against transformers' own tokenization."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, processors
from transformers import AutoTokenizer

from qlora_service.data.rendering import renderer as rendering
from qlora_service.data.rendering.renderer import RenderedRow, Renderer, RenderRules, UnusableRow, render_report
from qlora_service.data.rows.examples import Chat, Completion, Example, Labelled, Preference, SourceRow, Text
from qlora_service.errors import InvalidModel

NOW = datetime(2026, 3, 1, tzinfo=UTC)
RULES = RenderRules(512)
LANGUAGES = ["Grüße aus Köln", "日本語のテキスト", "שלום עולם", "नमस्ते दुनिया", "👩‍👩‍👧 emoji ﷽", "a\u0301 combining"]


def chat(question: str, answer: str) -> Chat:
    return Chat(({"role": "user", "content": question}, {"role": "assistant", "content": answer}), (False, True))


def render(model_dir: Path, examples: Iterable[Example], rules: RenderRules = RULES) -> list[RenderedRow | UnusableRow]:
    rows = [SourceRow(example, line, 0) for line, example in enumerate(examples, start=1)]
    with Renderer(model_dir, rules, NOW) as renderer:
        return list(renderer.render(rows))


def render_one(model_dir: Path, example: Example, rules: RenderRules = RULES) -> RenderedRow:
    (result,) = render(model_dir, [example], rules)
    assert isinstance(result, RenderedRow)
    return result


def trained_text(model_dir: Path, row: RenderedRow) -> str:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return str(tokenizer.decode([token for token, on in zip(row.input_ids, row.trained, strict=True) if on]))


def adding_bos(model_dir: Path, target: Path) -> Path:
    """A copy of the model whose tokenizer puts a BOS in front, as Llama's does."""
    shutil.copytree(model_dir, target)
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    bos = tokenizer.token_to_id("<|im_start|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    tokenizer.save(str(target / "tokenizer.json"))
    return target


@pytest.mark.parametrize("text", LANGUAGES)
def test_ids_are_those_of_transformers(tiny_model: Path, text: str) -> None:
    row = render_one(tiny_model, chat(text, text))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    conversation = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    assert list(row.input_ids) == tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"]


@pytest.mark.parametrize("text", LANGUAGES)
def test_the_answer_and_its_stop_token_are_trained_and_nothing_else(tiny_model: Path, text: str) -> None:
    row = render_one(tiny_model, chat("question", text))
    assert trained_text(tiny_model, row) == f"{text}<|im_end|>"


def test_the_line_break_behind_the_stop_token_is_not_trained(tiny_model: Path) -> None:
    row = render_one(tiny_model, chat("question", "answer"))
    assert row.trained[-1] is False
    assert row.text.endswith("<|im_end|>\n")


def test_the_stop_token_is_trained_where_pad_is_the_same_token(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "pad-is-eos")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<|im_end|>"}))
    row = render_one(model, chat("question", "answer"))
    assert trained_text(model, row) == "answer<|im_end|>"


def test_weight_zero_turns_are_not_trained(tiny_model: Path) -> None:
    turns = chat("one", "first").messages + chat("two", "second").messages
    row = render_one(tiny_model, Chat(turns, (False, False, False, True)))
    assert trained_text(tiny_model, row) == "second<|im_end|>"


def test_every_trained_turn_is_trained(tiny_model: Path) -> None:
    turns = chat("one", "same").messages + chat("two", "same").messages
    row = render_one(tiny_model, Chat(turns, (False, True, False, True)))
    assert trained_text(tiny_model, row) == "same<|im_end|>same<|im_end|>"


def test_generation_block_that_leaves_the_stop_token_out_still_trains_it(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "marked")
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
    )
    row = render_one(model, chat("question", "answer"))
    assert trained_text(model, row) == "answer<|im_end|>"


def test_template_without_a_stop_token_gets_one_that_is_trained(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "endless")
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    row = render_one(model, chat("question", "answer"))
    # The space before the answer is part of its first token: a token is trained if any of it is.
    assert trained_text(model, row) == " answer\n<|im_end|>"


def test_completion_trains_the_completion_and_the_stop_token(tiny_model: Path) -> None:
    row = render_one(tiny_model, Completion("two plus two is", " four"))
    assert trained_text(tiny_model, row) == " four<|im_end|>"


def test_an_answer_of_spaces_behind_a_special_token_is_trained(tiny_model: Path) -> None:
    row = render_one(tiny_model, Completion("<|im_start|>", "  "))
    assert trained_text(tiny_model, row) == "  <|im_end|>"


def test_text_is_trained_whole(tiny_model: Path) -> None:
    row = render_one(tiny_model, Text("a small house"))
    assert all(row.trained)
    assert trained_text(tiny_model, row) == "a small house<|im_end|>"


def test_train_on_all_trains_the_question_too(tiny_model: Path) -> None:
    row = render_one(tiny_model, chat("question", "answer"), RenderRules(512, train_on="all"))
    assert all(row.trained)


@pytest.mark.parametrize("example", [Text("hello"), Completion("a", "b"), Text("<|im_start|>hello")])
def test_one_bos(tiny_model: Path, tmp_path: Path, example: Example) -> None:
    model = adding_bos(tiny_model, tmp_path / "bos")
    bos = Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id("<|im_start|>")
    row = render_one(model, example)
    assert row.input_ids[0] == bos
    assert row.input_ids.count(bos) == 1


def test_template_that_writes_the_bos_gets_no_second_one(tiny_model: Path, tmp_path: Path) -> None:
    model = adding_bos(tiny_model, tmp_path / "bos")
    row = render_one(model, chat("question", "answer"))
    bos = Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id("<|im_start|>")
    assert row.input_ids.count(bos) == 2  # one a turn, as ChatML has it; none in front


def test_base_without_a_template_gets_the_plain_one(tiny_model: Path, tmp_path: Path) -> None:
    model = adding_bos(tiny_model, tmp_path / "plain")
    (model / "chat_template.jinja").unlink()
    row = render_one(model, chat("question", "answer"))
    assert row.text == "<|im_start|>### Instruction:\nquestion\n\n### Response:\nanswer<|im_end|>"
    assert trained_text(model, row) == "answer<|im_end|>"


def test_row_over_the_limit_is_refused_with_its_length(tiny_model: Path) -> None:
    short, long = render(tiny_model, [Text("short"), Text("word " * 300)], RenderRules(64))
    assert isinstance(short, RenderedRow)
    assert isinstance(long, UnusableRow)
    assert long.too_long is not None
    assert long.too_long > 64
    assert long.finding.line == 2
    assert "max_seq_len_tokens is 64" in long.finding.reason


def test_truncation_cuts_the_end_and_says_how_much(tiny_model: Path) -> None:
    whole = render_one(tiny_model, Text("word " * 300), RenderRules(4096))
    cut = render_one(tiny_model, Text("word " * 300), RenderRules(64, too_long="truncate"))
    assert cut.input_ids == whole.input_ids[:64]
    assert cut.cut_tokens == len(whole.input_ids) - 64


def test_row_whose_answer_was_cut_off_is_a_finding(tiny_model: Path) -> None:
    (result,) = render(tiny_model, [chat("word " * 300, "answer")], RenderRules(64, too_long="truncate"))
    assert isinstance(result, UnusableRow)
    assert "nothing to train" in result.finding.reason


def test_rows_are_held_by_their_size_too(tiny_model: Path) -> None:
    read = 0

    def rows() -> Iterator[SourceRow]:
        nonlocal read
        for read in range(1, 65):
            yield SourceRow(Text("word " * 20_000), read, None)

    with Renderer(tiny_model, RULES, NOW) as renderer:
        next(renderer.render(rows()))
    # Four batches of two: one finished, one tokenized ahead, one rendered ahead, one begun; and the row that did not
    # fit any more.
    assert read <= 9


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "BATCH_CHARS", 200)


@pytest.mark.usefixtures("small_batches")
def test_of_an_enormous_row_only_the_beginning_is_tokenized(tiny_model: Path) -> None:
    tokens = len(Tokenizer.from_file(str(tiny_model / "tokenizer.json")).encode("word " * 3000).ids)
    short, long = render(tiny_model, [Text("short"), Text("word " * 3000)], RenderRules(64))
    assert isinstance(short, RenderedRow)
    assert isinstance(long, UnusableRow)
    assert long.too_long is not None
    assert 128 < long.too_long < tokens / 4
    assert f"over {long.too_long} tokens long; max_seq_len_tokens is 64" in long.finding.reason


@pytest.mark.parametrize("text", ["word " * 3000, "a" * 9000, "日本語" * 3000, "".join(LANGUAGES) * 90])
def test_an_enormous_row_is_truncated_to_the_same_tokens(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    rules = RenderRules(64, too_long="truncate")
    whole = render_one(tiny_model, Text(text), rules)
    monkeypatch.setattr(rendering, "BATCH_CHARS", 200)
    beginning = render_one(tiny_model, Text(text), rules)
    assert (beginning.input_ids, beginning.trained) == (whole.input_ids, whole.trained)
    assert 0 < beginning.cut_tokens < whole.cut_tokens


@pytest.mark.usefixtures("small_batches")
def test_an_enormous_row_of_few_tokens_is_not_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "squeezing")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Replace(Regex(" +"), " ")
    tokenizer.save(str(model / "tokenizer.json"))
    row = render_one(model, Text("a" + " " * 50_000 + "b"), RenderRules(8))
    assert trained_text(model, row) == "a b<|im_end|>"


def test_a_conversation_of_many_answers_is_searched_in_linear_time(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "marked")
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    turns = Chat(chat("a question", "the answer").messages * 4000, (False, True) * 4000)
    start = time.thread_time()
    row = render_one(model, turns, RenderRules(1 << 20))
    assert time.thread_time() - start < 3
    assert trained_text(model, row) == "the answer<|im_end|>" * 4000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", b'{"eos_token_id": [[1]]}'),
        ("generation_config.json", b"{"),
        ("tokenizer_config.json", b'{"eos_token": {"x": 1}}'),
        ("tokenizer_config.json", b'{"eos_token": {"content": 5}}'),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_model_with_unusable_settings_is_refused(tiny_model: Path, tmp_path: Path, name: str, content: bytes) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "odd")
    (model / name).write_bytes(content)
    with pytest.raises(InvalidModel, match=name):
        render(model, [Text("hello")])


def test_a_tokenizer_that_fails_on_text_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "speechless")
    Tokenizer(models.WordLevel({"hello": 0}, unk_token="<unk>")).save(str(model / "tokenizer.json"))
    with pytest.raises(InvalidModel, match=r"tokenizer\.json cannot tokenize"):
        render(model, [Text("good bye")])


def test_report_counts_lengths_and_findings(tiny_model: Path) -> None:
    rows = [SourceRow(Text("word " * count), count, None) for count in range(1, 101)]
    with Renderer(tiny_model, RenderRules(64), NOW) as renderer:
        report = render_report(renderer, rows, max_rows=90)
    assert report.rows == sum(report.histogram.values()) == 90
    assert report.complete is False
    assert report.usable_rows + report.too_long_rows == 90
    assert report.too_long_rows == report.finding_count > 0
    assert report.longest_tokens > 64


def test_the_stop_token_may_be_the_generation_configs(tiny_model: Path, tmp_path: Path) -> None:
    """As Llama 3: the turn ends with a token that is not the tokenizer's eos."""
    model = shutil.copytree(tiny_model, tmp_path / "other-eos")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|endoftext|>"}))
    stop = Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id("<|im_end|>")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
    )
    assert trained_text(model, render_one(model, chat("question", "answer"))) == "answer<|im_end|>"


def test_of_several_templates_the_default_is_taken(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "named")
    default = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    config = json.loads((model / "tokenizer_config.json").read_text())
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": default}]
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    assert render_one(model, chat("q", "a")) == render_one(tiny_model, chat("q", "a"))


def test_the_tokenizers_own_truncation_and_padding_are_off(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "cutting")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(model / "tokenizer.json"))
    assert render_one(model, chat("question", "answer")) == render_one(tiny_model, chat("question", "answer"))


def without_eos(model_dir: Path, target: Path) -> Path:
    """A copy of the model whose tokenizer_config.json names neither eos nor bos, as older models have it."""
    shutil.copytree(model_dir, target)
    config = json.loads((target / "tokenizer_config.json").read_text())
    left = {key: value for key, value in config.items() if key not in {"eos_token", "bos_token"}}
    (target / "tokenizer_config.json").write_text(json.dumps(left))
    return target


def test_the_stop_token_may_be_named_in_the_special_tokens_map(tiny_model: Path, tmp_path: Path) -> None:
    model = without_eos(tiny_model, tmp_path / "mapped")
    (model / "generation_config.json").unlink(missing_ok=True)
    (model / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    row = render_one(model, Completion("two plus two is", " four"))
    assert trained_text(tiny_model, row) == " four<|endoftext|>"


def test_the_stop_token_may_be_a_number_in_the_models_config(tiny_model: Path, tmp_path: Path) -> None:
    model = without_eos(tiny_model, tmp_path / "numbered")
    (model / "generation_config.json").unlink(missing_ok=True)
    row = render_one(model, Completion("two plus two is", " four"))
    assert trained_text(tiny_model, row) == " four<|im_end|>"


def test_a_completion_that_ends_in_another_special_token_still_gets_its_stop(tiny_model: Path) -> None:
    row = render_one(tiny_model, Completion("open", " a turn<|im_start|>"))
    assert trained_text(tiny_model, row) == " a turn<|im_start|><|im_end|>"


def test_a_generation_block_that_ends_in_another_special_token_trains_the_stop_behind_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "calls")
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{{ '<|endoftext|>\n' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
    )
    assert trained_text(model, render_one(model, chat("q", "call"))) == "call<|endoftext|>\n<|im_end|>"


def pair(question: str, chosen: str, rejected: str) -> Preference:
    return Preference(chat(question, chosen), chat(question, rejected))


def test_both_sides_of_a_pair_are_rendered_as_they_would_be_alone(tiny_model: Path) -> None:
    plain = Preference(Completion("two plus two is", " four"), Completion("two plus two is", " five"))
    for example in (pair("question", "answer", "other"), plain):
        both = render_one(tiny_model, example)
        assert both.rejected == render_one(tiny_model, example.rejected)
        assert replace(both, rejected=None) == render_one(tiny_model, example.chosen)


def test_rows_of_all_kinds_stay_in_order(tiny_model: Path) -> None:
    examples = [
        pair("q", "a", "b"),
        Text("hello"),
        Labelled(chat("q", "c"), True),
        chat("q", "d"),
        Labelled(Completion("q", "e"), False),
        pair("q", "f", "g"),
    ]
    rows = [row for row in render(tiny_model, examples) if isinstance(row, RenderedRow)]
    assert [trained_text(tiny_model, row) for row in rows] == [
        f"{text}<|im_end|>" for text in ["a", "hello", "c", "d", "e", "f"]
    ]
    rejected = [row.rejected and trained_text(tiny_model, row.rejected) for row in rows]
    assert rejected == ["b<|im_end|>", None, None, None, None, "g<|im_end|>"]
    assert [row.desirable for row in rows] == [None, None, True, None, False, None]
    assert [row.line for row in rows] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("example", [pair("question", "answer", "other"), Labelled(chat("question", "answer"), True)])
def test_of_a_judged_answer_the_prompt_is_never_trained(tiny_model: Path, example: Example) -> None:
    row = render_one(tiny_model, example, RenderRules(512, train_on="all"))
    assert trained_text(tiny_model, row) == "answer<|im_end|>"


def test_a_pair_is_too_long_when_one_side_is(tiny_model: Path) -> None:
    long = "word " * 300
    for example, side in ((pair("q", "a", long), "rejected"), (pair("q", long, "a"), "chosen")):
        (result,) = render(tiny_model, [example], RenderRules(64))
        assert isinstance(result, UnusableRow)
        assert result.too_long is not None
        assert result.too_long > 64
        assert result.finding.reason.startswith(f"the {side} answer: {result.too_long} tokens long")


def test_a_truncated_pair_keeps_something_to_train_on_both_sides(tiny_model: Path) -> None:
    rules = RenderRules(64, too_long="truncate")
    cut = render_one(tiny_model, pair("q", "answer", "word " * 300), rules)
    assert cut.rejected is not None
    assert (cut.cut_tokens, len(cut.rejected.input_ids)) == (0, 64)
    assert cut.rejected.cut_tokens > 0
    (nothing,) = render(tiny_model, [pair("word " * 300, "answer", "other")], rules)
    assert isinstance(nothing, UnusableRow)
    assert "the chosen answer: nothing to train" in nothing.finding.reason
    assert "the rejected answer: nothing to train" in nothing.finding.reason


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("word", "word ", "the same tokens"),
        ("word " * 300, "word " * 300 + "other", "the same tokens once they are cut"),
    ],
)
def test_a_pair_that_renders_to_the_same_tokens_is_a_finding(
    tiny_model: Path, tmp_path: Path, chosen: str, rejected: str, reason: str
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "trimming")
    template = (model / "chat_template.jinja").read_text().replace("message['content']", "message['content'] | trim")
    (model / "chat_template.jinja").write_text(template)
    (result,) = render(model, [pair("q", chosen, rejected)], RenderRules(64, too_long="truncate"))
    assert isinstance(result, UnusableRow)
    assert result.finding.reason.endswith(reason)


def test_a_pair_of_which_the_template_refuses_a_side_is_a_finding(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "refusing")
    template = (model / "chat_template.jinja").read_text()
    refusing = "{% if messages[-1].content == 'no' %}{{ raise_exception('refused') }}{% endif %}"
    (model / "chat_template.jinja").write_text(refusing + template)
    refused, fine = render(model, [pair("q", "yes", "no"), pair("q", "yes", "maybe")])
    assert isinstance(refused, UnusableRow)
    assert refused.finding.reason.startswith("the rejected answer: the chat template refused")
    assert isinstance(fine, RenderedRow)


def test_report_counts_both_sides_of_a_pair_and_the_longer_one_as_its_length(tiny_model: Path) -> None:
    examples = [pair("q", "a", "word " * 20), pair("q", "word " * 300, "a")]
    rules = RenderRules(128, too_long="truncate")
    rows = [row for row in render(tiny_model, examples, rules) if isinstance(row, RenderedRow)]
    source = [SourceRow(example, line, None) for line, example in enumerate(examples, start=1)]
    with Renderer(tiny_model, rules, NOW) as renderer:
        report = render_report(renderer, source, max_rows=10)
    sides = [side for row in rows for side in (row, row.rejected) if side is not None]
    assert (report.rows, report.usable_rows, report.cut_rows) == (2, 2, 1)
    assert report.tokens == sum(len(side.input_ids) for side in sides)
    assert report.trained_tokens == sum(side.trained_tokens for side in sides)
    assert report.longest_tokens == 128 + rows[1].cut_tokens
    assert sum(report.histogram.values()) == 2


@pytest.mark.usefixtures("small_batches")
def test_of_an_enormous_pair_only_the_beginnings_are_tokenized(tiny_model: Path) -> None:
    (result,) = render(tiny_model, [pair("q", "word " * 3000, "house " * 3000)], RenderRules(64))
    assert isinstance(result, UnusableRow)
    assert result.too_long is not None
    assert 128 < result.too_long < 1500
    assert result.finding.reason.count("over ") == 2


def test_a_renderer_goes_on_after_results_that_nobody_read(tiny_model: Path) -> None:
    rows = [SourceRow(chat("q", f"answer {line}"), line, None) for line in range(1000)]
    with Renderer(tiny_model, RULES, NOW) as renderer:
        unread = renderer.render(rows)
        next(unread)
        del unread
        (row,) = renderer.render([SourceRow(chat("q", "other"), 7, None)])
    assert isinstance(row, RenderedRow)
    assert trained_text(tiny_model, row) == "other<|im_end|>"
