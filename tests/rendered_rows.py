"""Examples rendered with the tiny model's tokenizer and chat template, and the text of their trained tokens."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from transformers import AutoTokenizer

from qlora_service.data.rendering.renderer import RenderedRow, Renderer, RenderRules, UnusableRow
from qlora_service.data.rows.examples import Chat, Example, Preference, SourceRow

NOW = datetime(2026, 3, 1, tzinfo=UTC)
RULES = RenderRules(512)
PLAIN = RenderRules(512, prompt_format="plain")


def chat(question: str, answer: str) -> Chat:
    return Chat(({"role": "user", "content": question}, {"role": "assistant", "content": answer}), (False, True))


def pair(question: str, chosen: str, rejected: str) -> Preference:
    return Preference(chat(question, chosen), chat(question, rejected))


def render(model_dir: Path, examples: Iterable[Example], rules: RenderRules = RULES) -> list[RenderedRow | UnusableRow]:
    rows = [SourceRow(example, line, 0) for line, example in enumerate(examples, start=1)]
    with Renderer(model_dir, rules, NOW) as renderer:
        return list(renderer.render(rows))


def render_one(model_dir: Path, example: Example, rules: RenderRules = RULES) -> RenderedRow:
    (result,) = render(model_dir, [example], rules)
    assert isinstance(result, RenderedRow)
    return result


def with_template(model_dir: Path, to: Path, template: str) -> Path:
    """A copy of the model with another chat template."""
    shutil.copytree(model_dir, to)
    (to / "chat_template.jinja").write_text(template)
    return to


def trained_text(model_dir: Path, row: RenderedRow) -> str:
    """The text of the row's trained tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = [token for token, is_trained in zip(row.input_ids, row.trained, strict=True) if is_trained]
    return str(tokenizer.decode(ids))
