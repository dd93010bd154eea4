"""Text prompts on models with and without a chat template, and tokens that straddle a plain prompt's end."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors

from qlora_service.data.rendering.prompt_format import CUT_SEAM, EMPTY_PROMPT, with_turns
from qlora_service.data.rendering.renderer import RenderedRow, Renderer, RenderRules
from qlora_service.data.rendering.report import render_report
from qlora_service.data.rendering.tokenizer_settings import PLAIN_TEMPLATE
from qlora_service.data.rows.examples import Completion, Example, LabeledAnswer, Preference, SourceRow
from tests.rendered_rows import NOW, PLAIN, chat, pair, render_one, trained_text
from tests.tiny_model import build_tiny_model

pytestmark = pytest.mark.slow

TEXT_PROMPTS = {
    "completion": (Completion("2 + 2 =", "4"), chat("2 + 2 =", "4")),
    "preference": (Preference(Completion("q", "yes"), Completion("q", "no")), pair("q", "yes", "no")),
    "kto": (LabeledAnswer(Completion("q", "no"), False), LabeledAnswer(chat("q", "no"), False)),
}


@pytest.fixture(scope="module")
def bare_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without a chat template."""
    return build_tiny_model(tmp_path_factory.mktemp("bare") / "model", chat_template=None)


@pytest.mark.parametrize("kind", TEXT_PROMPTS)
def test_text_prompt_is_a_user_turn_where_the_model_has_a_chat_template(tiny_model: Path, kind: str) -> None:
    text, turns = TEXT_PROMPTS[kind]
    row = render_one(tiny_model, text)
    assert row == render_one(tiny_model, turns)
    assert not row.has_plain_prompt


@pytest.mark.parametrize("kind", TEXT_PROMPTS)
def test_text_prompt_stays_plain_where_the_model_has_no_chat_template(
    tiny_model: Path, bare_model: Path, tmp_path: Path, kind: str
) -> None:
    text, _ = TEXT_PROMPTS[kind]
    with_fallback = shutil.copytree(bare_model, tmp_path / "fallback")
    (with_fallback / "chat_template.jinja").write_text("{{ bos_token }}" + PLAIN_TEMPLATE)
    plain = render_one(tiny_model, text, PLAIN)
    assert plain.has_plain_prompt
    assert plain.text in ("2 + 2 =4", "qyes", "qno")
    for model in (bare_model, with_fallback):
        assert render_one(model, text) == plain


def test_turns_on_a_model_without_a_chat_template_are_rendered_when_asked_for(bare_model: Path) -> None:
    rules = replace(PLAIN, prompt_format="chat")
    assert render_one(bare_model, Completion("Ask", "Reply"), rules).text == (
        "### Instruction:\nAsk\n\n### Response:\nReply<|im_end|>"
    )


@pytest.mark.parametrize("trims_offsets", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion", "is_cut"),
    [
        ("The capital is ", "the house", True),
        ("The capital is", " the house", False),
        ("The capital is\n", "the house", False),
        ("assist", "ant", True),
        ("首都是", "巴黎", False),
        ("", "the house", False),
    ],
)
def test_token_across_the_seam_of_a_plain_row_is_trained_with_a_warning(
    tiny_model: Path, tmp_path: Path, prompt: str, completion: str, is_cut: bool, trims_offsets: bool
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trims_offsets)
    tokenizer.save(str(model / "tokenizer.json"))
    row = render_one(model, Completion(prompt, completion), PLAIN)
    assert [(warning.reason, warning.pointer, warning.line) for warning in row.warnings] == (
        [(CUT_SEAM, "/prompt", 1)] if is_cut else []
    )
    trained = trained_text(model, row).removesuffix("<|im_end|>")
    assert trained.endswith(completion)
    assert (trained != completion) == is_cut


def test_pair_has_one_warning_for_the_seam_of_either_answer(tiny_model: Path) -> None:
    examples: list[Example] = [
        Preference(Completion("is ", "the"), Completion("is ", "a")),
        Preference(Completion("is ", "."), Completion("is ", "the")),
        LabeledAnswer(Completion("is ", "the"), True),
    ]
    for example in examples:
        assert [warning.reason for warning in render_one(tiny_model, example, PLAIN).warnings] == [CUT_SEAM]


def test_seam_is_no_finding_where_every_token_is_trained(tiny_model: Path) -> None:
    rules = replace(PLAIN, train_on="all")
    assert render_one(tiny_model, Completion("is ", "the"), rules).warnings == ()


def test_empty_prompt_as_a_turn_is_a_warning() -> None:
    (warning,) = with_turns(SourceRow(Completion(" ", "the house"), 3, 7)).warnings
    assert (warning.reason, warning.pointer, warning.line, warning.byte_offset) == (EMPTY_PROMPT, "/prompt", 3, 7)
    row = SourceRow(chat("q", "a"), 1, 0)
    assert with_turns(row) is row


def test_report_counts_rows_with_plain_prompts(tiny_model: Path) -> None:
    rows = [SourceRow(example, line, 0) for line, example in enumerate([Completion("q", "a"), chat("q", "a")], 1)]
    for rules, plain in ((PLAIN, 1), (RenderRules(512), 0)):
        with Renderer(tiny_model, rules, NOW) as renderer:
            report = render_report(renderer, rows, 2)
        assert (report.usable_rows, report.plain_prompts) == (2, plain)
        assert isinstance(report.plain_prompts, int)


def test_long_plain_prompt_is_checked_in_the_tokenized_part(tiny_model: Path, small_batches: None) -> None:
    rows = [render_one(tiny_model, Completion("word " * 100, "house"), replace(PLAIN, max_seq_len_tokens=400))]
    assert all(isinstance(row, RenderedRow) and len(row.warnings) == 1 for row in rows)
