"""Rows with a token that the base has no embedding for."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_service.data.rendering.renderer import RenderedRow, Renderer, RenderRules, UnusableRow
from qlora_service.data.rendering.report import render_report
from qlora_service.data.rows.examples import Example, SourceRow
from tests.rendered_rows import NOW, RULES, chat, pair
from tests.unknown_tokens import build_model_with_unknown_tokens

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    path = tmp_path_factory.mktemp("models") / "unknown"
    return path, build_model_with_unknown_tokens(path)


def render(model: tuple[Path, int], *examples: Example, rules: RenderRules = RULES) -> list[object]:
    path, embeddings = model
    rows = [SourceRow(example, line, 0) for line, example in enumerate(examples, start=1)]
    with Renderer(path, rules, NOW, embeddings=embeddings) as renderer:
        return list(renderer.render(rows))


def test_finding_names_line_token_and_number_of_embeddings(model: tuple[Path, int]) -> None:
    usable, unusable = render(model, chat("Where?", "Here."), chat("Where is <|seat|>?", "Here."))
    assert isinstance(usable, RenderedRow)
    assert isinstance(unusable, UnusableRow)
    assert unusable.unknown_token
    rows = model[1]
    assert str(unusable.finding).startswith(
        f"line 2: it has token {rows + 1} (<|seat|>), and the base has embeddings for {rows} tokens (0 to {rows - 1}): "
        "resize "
    )


def test_either_side_of_a_pair_is_checked(model: tuple[Path, int]) -> None:
    results = render(model, pair("Where?", "Here.", "At <|ticket|>."), pair("Where?", "At <|ticket|>.", "Here."))
    assert [isinstance(row, UnusableRow) and row.unknown_token for row in results] == [True, True]


def test_token_that_is_cut_off_is_no_problem(model: tuple[Path, int]) -> None:
    example = chat("Where?", "Here. " * 40 + "<|seat|>")
    (cut,) = render(model, example, rules=RenderRules(64, too_long="truncate"))
    assert isinstance(cut, RenderedRow)


def test_stop_token_that_is_appended_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "model"
    embeddings = build_model_with_unknown_tokens(path, eos_token="<|seat|>", chat_template="{{ messages[1].content }}")
    (result,) = render((path, embeddings), chat("Where?", "Here."))
    assert isinstance(result, UnusableRow)
    assert "(<|seat|>)" in result.finding.reason


def test_report_counts_rows_with_unknown_tokens(model: tuple[Path, int]) -> None:
    rows = [SourceRow(chat(f"{n} <|seat|>" if n % 2 else f"{n}", "Yes."), n, 0) for n in range(1, 6)]
    with Renderer(model[0], RenderRules(512), NOW, embeddings=model[1]) as renderer:
        report = render_report(renderer, rows, 100)
    assert (report.rows, report.usable_rows, report.unknown_token_rows) == (5, 2, 3)
