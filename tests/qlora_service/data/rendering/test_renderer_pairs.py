"""Preference pairs and labeled answers as rows of token ids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qlora_service.data.rendering.renderer import RenderedRow, Renderer, RenderRules, UnusableRow
from qlora_service.data.rendering.report import render_report
from qlora_service.data.rows.examples import Completion, Example, LabeledAnswer, Preference, SourceRow, Text
from tests.rendered_rows import NOW, chat, pair, render, render_one, trained_text, with_template

pytestmark = pytest.mark.slow


def test_each_side_of_a_pair_is_rendered_as_if_alone(tiny_model: Path) -> None:
    plain = Preference(Completion("two plus two is", " four"), Completion("two plus two is", " five"))
    for example in (pair("question", "answer", "other"), plain):
        both = render_one(tiny_model, example)
        assert both.rejected == render_one(tiny_model, example.rejected)
        assert replace(both, rejected=None) == render_one(tiny_model, example.chosen)


def test_rows_of_all_types_stay_in_order(tiny_model: Path) -> None:
    examples = [
        pair("q", "a", "b"),
        Text("hello"),
        LabeledAnswer(chat("q", "c"), True),
        chat("q", "d"),
        LabeledAnswer(Completion("q", "e"), False),
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


@pytest.mark.parametrize(
    "example", [pair("question", "answer", "other"), LabeledAnswer(chat("question", "answer"), True)]
)
def test_prompt_of_a_pair_or_labeled_answer_is_never_trained(tiny_model: Path, example: Example) -> None:
    row = render_one(tiny_model, example, RenderRules(512, train_on="all"))
    assert trained_text(tiny_model, row) == "answer<|im_end|>"


def test_pair_is_too_long_when_one_side_is(tiny_model: Path) -> None:
    long = "word " * 300
    for example, side in ((pair("q", "a", long), "rejected"), (pair("q", long, "a"), "chosen")):
        (result,) = render(tiny_model, [example], RenderRules(64))
        assert isinstance(result, UnusableRow)
        assert result.too_long is not None
        assert result.too_long > 64
        assert result.finding.reason.startswith(f"the {side} answer: {result.too_long} tokens long")


def test_truncated_pair_has_trained_tokens_on_both_sides(tiny_model: Path) -> None:
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
        ("word " * 300, "word " * 300 + "other", "the same tokens after truncation"),
    ],
)
def test_pair_that_renders_to_the_same_tokens_is_a_finding(
    tiny_model: Path, tmp_path: Path, chosen: str, rejected: str, reason: str
) -> None:
    template = (tiny_model / "chat_template.jinja").read_text()
    trimming = template.replace("message['content']", "message['content'] | trim")
    model = with_template(tiny_model, tmp_path / "trimming", trimming)
    (result,) = render(model, [pair("q", chosen, rejected)], RenderRules(64, too_long="truncate"))
    assert isinstance(result, UnusableRow)
    assert result.finding.reason.endswith(reason)


def test_pair_with_a_side_that_the_template_refuses_is_a_finding(tiny_model: Path, tmp_path: Path) -> None:
    template = (tiny_model / "chat_template.jinja").read_text()
    refusing = "{% if messages[-1].content == 'no' %}{{ raise_exception('refused') }}{% endif %}"
    model = with_template(tiny_model, tmp_path / "refusing", refusing + template)
    refused, fine = render(model, [pair("q", "yes", "no"), pair("q", "yes", "maybe")])
    assert isinstance(refused, UnusableRow)
    assert refused.finding.reason.startswith("the rejected answer: the chat template refused")
    assert isinstance(fine, RenderedRow)


def test_report_counts_tokens_of_both_sides_and_the_length_of_the_longer(tiny_model: Path) -> None:
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
def test_only_prefixes_of_a_very_long_pair_are_tokenized(tiny_model: Path) -> None:
    (result,) = render(tiny_model, [pair("q", "word " * 3000, "house " * 3000)], RenderRules(64))
    assert isinstance(result, UnusableRow)
    assert result.too_long is not None
    assert 128 < result.too_long < 1500
    assert result.finding.reason.count("over ") == 2
