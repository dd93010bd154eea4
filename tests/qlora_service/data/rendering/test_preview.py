"""Previews of rows whose characters span several tokens, with byte-level and with byte-fallback tokenizers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from qlora_service.data.rendering.preview import preview_row, trained_spans
from qlora_service.data.rendering.renderer import Renderer, RenderRules
from qlora_service.data.rows.examples import Example, SourceRow, Text
from tests.rendered_rows import NOW, RULES, chat, pair
from tests.tiny_model import SPECIAL_TOKENS

pytestmark = pytest.mark.slow

TEXTS = {
    "Chinese": "你好世界",
    "Japanese": "日本語のテキスト",
    "emoji": "fine 👩‍👩‍👧 👍🏽",
    "Arabic": "مرحبا بالعالم",
}


@pytest.fixture
def byte_fallback_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with a tokenizer as Llama 2's: a token per known character, and per byte of the others."""
    model = shutil.copytree(tiny_model, tmp_path / "byte-fallback")
    words = ["<unk>", "▁", *map(chr, range(33, 127)), *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: token_id for token_id, token in enumerate([*SPECIAL_TOKENS, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.save(str(model / "tokenizer.json"))
    return model


def preview(model: Path, example: Example, rules: RenderRules = RULES) -> dict[str, Any]:
    with Renderer(model, rules, NOW) as renderer:
        (result,) = renderer.render([SourceRow(example, 1, 0)])
        return preview_row(renderer, result)


def trained_texts(document: dict[str, Any]) -> list[str]:
    return [document["text"][start:end] for start, end in document["trained_spans"]]


@pytest.mark.parametrize("model", ["tiny_model", "byte_fallback_model"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_trained_spans_are_the_answers_whole_characters(model: str, text: str, request: pytest.FixtureRequest) -> None:
    row = preview(request.getfixturevalue(model), chat(text, text))
    assert trained_texts(row) == [f"{text}<|im_end|>"]
    assert row["text"].startswith(f"<|im_start|>user\n{text}<|im_end|>")
    assert row["appended_stop"] is None
    assert "\ufffd" not in str(row["tokens"])
    trained_part = [bytes_of(token["text"]) for token in row["tokens"] if token["trained"]]
    assert b"".join(trained_part).decode() == f"{text}<|im_end|>"


def bytes_of(token: str) -> bytes:
    """The bytes of a token's text, in which <0xE4> is a byte."""
    pieces = token.split("<0x")
    return pieces[0].encode() + b"".join(
        bytes.fromhex(piece[:2]) + piece.removeprefix(f"{piece[:2]}>").encode() for piece in pieces[1:]
    )


def test_both_answers_of_a_pair_have_their_spans(tiny_model: Path) -> None:
    row = preview(tiny_model, pair("问题", "对 👍", "不对 👎"))
    assert trained_texts(row) == ["对 👍<|im_end|>"]
    assert trained_texts(row["rejected"]) == ["不对 👎<|im_end|>"]


@pytest.mark.parametrize("limit", range(24, 40))
def test_text_of_a_truncated_row_ends_with_its_last_token(tiny_model: Path, limit: int) -> None:
    text = "日本語のテキスト 👍" * 9
    whole = preview(tiny_model, chat("q", text))
    cut = preview(tiny_model, chat("q", text), RenderRules(limit, too_long="truncate"))
    assert len(cut["tokens"]) == limit
    assert cut["tokens"] == whole["tokens"][:limit]
    assert whole["text"].startswith(cut["text"])
    assert cut["trained_spans"] == [(whole["trained_spans"][0][0], len(cut["text"]))]
    before = b"".join(bytes_of(token["text"]) for token in cut["tokens"])
    assert cut["text"][:-1].encode() == before[: len(cut["text"][:-1].encode())]
    assert len(before) <= len(cut["text"].encode())


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_tokens_that_are_not_in_the_text_are_told_apart(tiny_model: Path, tmp_path: Path, trim_offsets: bool) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "bos")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    bos = SPECIAL_TOKENS[1]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=trim_offsets),
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]),
        ]
    )
    tokenizer.save(str(model / "tokenizer.json"))
    row = preview(model, Text("  two words 世界 "))
    assert row["text"] == "  two words 世界 "
    assert trained_texts(row) == [row["text"]]
    assert row["appended_stop"] == "<|im_end|>"
    texts = [token["text"] for token in row["tokens"]]
    assert (texts[0], texts[-1]) == (bos, "<|im_end|>")
    assert "".join(texts[1:-1]).startswith("  two words ")


def test_runs_of_trained_tokens_are_spans_of_their_own() -> None:
    spans = [None, (0, 2), (2, 3), (2, 3), (4, 6), (6, 7), (7, 7), (7, 9), None]
    trained = [False, True, False, True, True, False, False, True, True]
    assert trained_spans(spans, trained) == [(0, 6), (7, 9)]
    assert trained_spans([(0, 1), (1, 1)], [False, True]) == []
