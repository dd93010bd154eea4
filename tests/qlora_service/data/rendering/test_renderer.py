"""Token ids and trained tokens of rows, compared with transformers' own tokenization."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, processors
from transformers import AutoTokenizer

from qlora_service.data.rendering import renderer as rendering
from qlora_service.data.rendering.renderer import RenderedRow, Renderer, RenderRules, UnusableRow
from qlora_service.data.rendering.report import render_report
from qlora_service.data.rows.examples import Chat, Completion, Example, SourceRow, Text
from qlora_service.errors import InvalidModel
from tests.rendered_rows import NOW, PLAIN, RULES, chat, render, render_one, trained_text, with_template

pytestmark = pytest.mark.slow

LANGUAGES = ["Grüße aus Köln", "日本語のテキスト", "שלום עולם", "नमस्ते दुनिया", "👩‍👩‍👧 emoji ﷽", "a\u0301 combining"]


def adding_bos(model_dir: Path, target: Path) -> Path:
    """A copy of the model whose tokenizer prepends a BOS token, as Llama's does."""
    shutil.copytree(model_dir, target)
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    bos = tokenizer.token_to_id("<|im_start|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    tokenizer.save(str(target / "tokenizer.json"))
    return target


@pytest.mark.parametrize("text", LANGUAGES)
def test_ids_equal_those_of_transformers(tiny_model: Path, text: str) -> None:
    row = render_one(tiny_model, chat(text, text))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    conversation = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    assert list(row.input_ids) == tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"]


@pytest.mark.parametrize("text", LANGUAGES)
def test_only_the_answer_and_its_stop_token_are_trained(tiny_model: Path, text: str) -> None:
    row = render_one(tiny_model, chat("question", text))
    assert trained_text(tiny_model, row) == f"{text}<|im_end|>"


def test_line_break_after_the_stop_token_is_not_trained(tiny_model: Path) -> None:
    row = render_one(tiny_model, chat("question", "answer"))
    assert row.trained[-1] is False
    assert row.text.endswith("<|im_end|>\n")


def test_stop_token_is_trained_where_pad_is_the_same_token(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "pad-is-eos")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<|im_end|>"}))
    row = render_one(model, chat("question", "answer"))
    assert trained_text(model, row) == "answer<|im_end|>"


def test_turns_with_weight_zero_are_not_trained(tiny_model: Path) -> None:
    turns = chat("one", "first").messages + chat("two", "second").messages
    row = render_one(tiny_model, Chat(turns, (False, False, False, True)))
    assert trained_text(tiny_model, row) == "second<|im_end|>"


def test_every_turn_marked_as_trained_is_trained(tiny_model: Path) -> None:
    turns = chat("one", "same").messages + chat("two", "same").messages
    row = render_one(tiny_model, Chat(turns, (False, True, False, True)))
    assert trained_text(tiny_model, row) == "same<|im_end|>same<|im_end|>"


def test_stop_token_outside_the_generation_block_is_trained(tiny_model: Path, tmp_path: Path) -> None:
    model = with_template(
        tiny_model,
        tmp_path / "marked",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}",
    )
    row = render_one(model, chat("question", "answer"))
    assert trained_text(model, row) == "answer<|im_end|>"


def test_stop_token_is_added_and_trained_where_the_template_writes_none(tiny_model: Path, tmp_path: Path) -> None:
    model = with_template(
        tiny_model,
        tmp_path / "endless",
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    )
    row = render_one(model, chat("question", "answer"))
    # The space before the answer is part of its first token: a token that overlaps the answer is trained.
    assert trained_text(model, row) == " answer\n<|im_end|>"


def test_no_token_is_appended_to_a_template_with_special_tokens(tiny_model: Path, tmp_path: Path) -> None:
    # As GLM 4.5's, whose turns end with the header of the next turn.
    model = with_template(
        tiny_model,
        tmp_path / "headers",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    )
    row = render_one(model, chat("question", "answer"))
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    assert list(row.input_ids) == AutoTokenizer.from_pretrained(model).apply_chat_template(messages)["input_ids"]
    assert [warning.reason for warning in row.warnings] == [rendering.NO_END]


def test_row_of_which_the_template_renders_no_answer_is_refused_with_the_reason(
    tiny_model: Path, tmp_path: Path
) -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    model = with_template(tiny_model, tmp_path / "questions", template)
    (result,) = render(model, [chat("question", "answer")])
    assert isinstance(result, UnusableRow)
    assert result.finding.reason.startswith("nothing to train: the chat template leaves out the message")


def test_completion_trains_the_completion_and_the_stop_token(tiny_model: Path) -> None:
    row = render_one(tiny_model, Completion("two plus two is", " four"), PLAIN)
    assert trained_text(tiny_model, row) == " four<|im_end|>"


def test_answer_of_spaces_after_a_special_token_is_trained(tiny_model: Path) -> None:
    row = render_one(tiny_model, Completion("<|im_start|>", "  "), PLAIN)
    assert trained_text(tiny_model, row) == "  <|im_end|>"


def test_text_is_trained_whole(tiny_model: Path) -> None:
    row = render_one(tiny_model, Text("a small house"))
    assert all(row.trained)
    assert trained_text(tiny_model, row) == "a small house<|im_end|>"


def test_train_on_all_trains_the_question_too(tiny_model: Path) -> None:
    row = render_one(tiny_model, chat("question", "answer"), RenderRules(512, train_on="all"))
    assert all(row.trained)


@pytest.mark.parametrize("example", [Text("hello"), Completion("a", "b"), Text("<|im_start|>hello")])
def test_plain_text_gets_exactly_one_bos(tiny_model: Path, tmp_path: Path, example: Example) -> None:
    model = adding_bos(tiny_model, tmp_path / "bos")
    bos = Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id("<|im_start|>")
    row = render_one(model, example, PLAIN)
    assert row.input_ids[0] == bos
    assert row.input_ids.count(bos) == 1


def test_template_that_writes_the_bos_gets_no_second_bos(tiny_model: Path, tmp_path: Path) -> None:
    model = adding_bos(tiny_model, tmp_path / "bos")
    row = render_one(model, chat("question", "answer"))
    bos = Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id("<|im_start|>")
    assert row.input_ids.count(bos) == 2  # one per turn, as in ChatML; none prepended


def test_base_model_without_a_template_uses_the_plain_template(tiny_model: Path, tmp_path: Path) -> None:
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


def test_truncation_cuts_the_end_and_counts_the_cut_tokens(tiny_model: Path) -> None:
    whole = render_one(tiny_model, Text("word " * 300), RenderRules(4096))
    cut = render_one(tiny_model, Text("word " * 300), RenderRules(64, too_long="truncate"))
    assert cut.input_ids == whole.input_ids[:64]
    assert cut.cut_tokens == len(whole.input_ids) - 64


def test_row_whose_answer_is_cut_off_is_a_finding(tiny_model: Path) -> None:
    (result,) = render(tiny_model, [chat("word " * 300, "answer")], RenderRules(64, too_long="truncate"))
    assert isinstance(result, UnusableRow)
    assert "nothing to train" in result.finding.reason


def test_rows_in_memory_are_limited_by_size_too(tiny_model: Path) -> None:
    rows_read = 0

    def rows() -> Iterator[SourceRow]:
        nonlocal rows_read
        for rows_read in range(1, 65):
            yield SourceRow(Text("word " * 20_000), rows_read, None)

    with Renderer(tiny_model, RULES, NOW) as renderer:
        next(renderer.render(rows()))
    # Four batches of two (one finished, one tokenized ahead, one rendered ahead, one begun), and the row that did not
    # fit into the last batch.
    assert rows_read <= 9


@pytest.mark.usefixtures("small_batches")
def test_only_a_prefix_of_a_very_long_row_is_tokenized(tiny_model: Path) -> None:
    tokens = len(Tokenizer.from_file(str(tiny_model / "tokenizer.json")).encode("word " * 3000).ids)
    short, long = render(tiny_model, [Text("short"), Text("word " * 3000)], RenderRules(64))
    assert isinstance(short, RenderedRow)
    assert isinstance(long, UnusableRow)
    assert long.too_long is not None
    assert 128 < long.too_long < tokens / 4
    assert f"over {long.too_long} tokens long; max_seq_len_tokens is 64" in long.finding.reason


@pytest.mark.parametrize("text", ["word " * 3000, "a" * 9000, "日本語" * 3000, "".join(LANGUAGES) * 90])
def test_very_long_row_is_truncated_to_the_same_tokens(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    rules = RenderRules(64, too_long="truncate")
    whole = render_one(tiny_model, Text(text), rules)
    monkeypatch.setattr(rendering, "BATCH_CHARS", 200)
    prefix = render_one(tiny_model, Text(text), rules)
    assert (prefix.input_ids, prefix.trained) == (whole.input_ids, whole.trained)
    assert 0 < prefix.cut_tokens < whole.cut_tokens


@pytest.mark.usefixtures("small_batches")
def test_very_long_row_of_few_tokens_is_not_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "squeezing")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Replace(Regex(" +"), " ")
    tokenizer.save(str(model / "tokenizer.json"))
    row = render_one(model, Text("a" + " " * 50_000 + "b"), RenderRules(8))
    assert trained_text(model, row) == "a b<|im_end|>"


def test_time_for_a_conversation_of_many_answers_is_linear(tiny_model: Path, tmp_path: Path) -> None:
    model = with_template(
        tiny_model,
        tmp_path / "marked",
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}",
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
def test_model_with_unusable_settings_is_refused(tiny_model: Path, tmp_path: Path, name: str, content: bytes) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "odd")
    (model / name).write_bytes(content)
    with pytest.raises(InvalidModel, match=name):
        render(model, [Text("hello")])


def test_tokenizer_that_fails_on_text_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "failing")
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


def test_stop_token_may_be_in_the_generation_config(tiny_model: Path, tmp_path: Path) -> None:
    """As in Llama 3: the turn ends with a token that is not the tokenizer's EOS token."""
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


def test_default_of_several_templates_is_used(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "named")
    default = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    config = json.loads((model / "tokenizer_config.json").read_text())
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": default}]
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    assert render_one(model, chat("q", "a")) == render_one(tiny_model, chat("q", "a"))


def test_truncation_and_padding_of_the_tokenizer_are_off(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "cutting")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(model / "tokenizer.json"))
    assert render_one(model, chat("question", "answer")) == render_one(tiny_model, chat("question", "answer"))


def without_eos(model_dir: Path, target: Path) -> Path:
    """A copy of the model whose tokenizer_config.json names neither EOS nor BOS, as in older models."""
    shutil.copytree(model_dir, target)
    config = json.loads((target / "tokenizer_config.json").read_text())
    remaining = {key: value for key, value in config.items() if key not in {"eos_token", "bos_token"}}
    (target / "tokenizer_config.json").write_text(json.dumps(remaining))
    return target


def test_stop_token_may_be_named_in_the_special_tokens_map(tiny_model: Path, tmp_path: Path) -> None:
    model = without_eos(tiny_model, tmp_path / "mapped")
    (model / "generation_config.json").unlink(missing_ok=True)
    (model / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    row = render_one(model, Completion("two plus two is", " four"), PLAIN)
    assert trained_text(tiny_model, row) == " four<|endoftext|>"


def test_stop_token_may_be_an_id_in_the_model_config(tiny_model: Path, tmp_path: Path) -> None:
    model = without_eos(tiny_model, tmp_path / "numbered")
    (model / "generation_config.json").unlink(missing_ok=True)
    row = render_one(model, Completion("two plus two is", " four"), PLAIN)
    assert trained_text(tiny_model, row) == " four<|im_end|>"


def test_completion_that_ends_with_another_special_token_gets_a_stop_token(tiny_model: Path) -> None:
    row = render_one(tiny_model, Completion("open", " a turn<|im_start|>"), PLAIN)
    assert trained_text(tiny_model, row) == " a turn<|im_start|><|im_end|>"


def test_stop_token_after_a_generation_block_with_another_special_token_is_trained(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = with_template(
        tiny_model,
        tmp_path / "calls",
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{{ '<|endoftext|>\n' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}",
    )
    assert trained_text(model, render_one(model, chat("q", "call"))) == "call<|endoftext|>\n<|im_end|>"


def test_renderer_works_after_a_generator_that_was_not_read_to_its_end(tiny_model: Path) -> None:
    rows = [SourceRow(chat("q", f"answer {line}"), line, None) for line in range(1000)]
    with Renderer(tiny_model, RULES, NOW) as renderer:
        unread = renderer.render(rows)
        next(unread)
        del unread
        (row,) = renderer.render([SourceRow(chat("q", "other"), 7, None)])
    assert isinstance(row, RenderedRow)
    assert trained_text(tiny_model, row) == "other<|im_end|>"
