from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Encoding, Tokenizer, pre_tokenizers, processors

from qlora_service.data.rendering.loss_mask import _ascending, trained_tokens
from tests.tiny_model import train_tokenizer

TOKENIZER = train_tokenizer()
SPECIAL = {TOKENIZER.token_to_id(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}
STOP = {TOKENIZER.token_to_id("<|im_end|>")}


def tokenizer_with(**parts: object) -> Tokenizer:
    """A copy of the tokenizer with some parts replaced."""
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


TOKENIZERS = {
    "byte level": TOKENIZER,
    "trimmed offsets": tokenizer_with(post_processor=processors.ByteLevel(trim_offsets=True)),
    "spaces dropped": tokenizer_with(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    ),
}
PIECES = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "<|endoftext|>", " ", "  ", "\n", "a house", "日本", "é", "👩‍👧", "7"]
)


def encode(tokenizer: Tokenizer, text: str) -> Encoding:
    return tokenizer.encode(text, add_special_tokens=False)


def trained_text(text: str, *answers: str, in_order: bool = True) -> str:
    """The trained part of a text, where each answer is a span."""
    encoding = encode(TOKENIZER, text)
    spans = [(text.index(answer), text.index(answer) + len(answer)) for answer in answers]
    trained = trained_tokens(encoding, text, spans, special_ids=SPECIAL, stop_ids=STOP, in_order=in_order)
    ids = [token for token, is_trained in zip(encoding.ids, trained, strict=True) if is_trained]
    return str(TOKENIZER.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize("in_order", [True, False])
def test_tokens_of_a_span_and_the_stop_token_after_it_are_trained(in_order: bool) -> None:
    text = "<|im_start|>question<|im_end|>\n<|im_start|>answer<|im_end|>\n"
    assert trained_text(text, "answer", in_order=in_order) == "answer<|im_end|>"
    assert trained_text(text, "answer<|im_end|>\n", in_order=in_order) == "answer<|im_end|>"
    assert trained_text(text, "question", "answer", in_order=in_order) == "question<|im_end|>answer<|im_end|>"


def test_stop_token_after_a_line_break_is_trained() -> None:
    text = "<|im_start|>question<|im_end|>\n<|im_start|>answer\n<|im_end|>\n"
    assert trained_text(text, "answer") == "answer\n<|im_end|>"


def test_special_tokens_after_the_stop_token_are_not_trained() -> None:
    text = "<|im_start|>question<|im_end|>\n<|im_start|>answer<|im_end|>\n<|endoftext|><|im_start|>"
    assert trained_text(text, "answer<|im_end|>\n<|endoftext|><|im_start|>") == "answer<|im_end|>"
    assert trained_text(text, "answer<|im_end|>\n<|endoftext|>") == "answer<|im_end|>"


def test_only_the_first_of_two_stop_tokens_is_trained() -> None:
    text = "<|im_start|>answer<|im_end|>\n<|im_end|>"
    assert trained_text(text, "answer<|im_end|>\n<|im_end|>") == "answer<|im_end|>"


def test_all_tokens_of_a_character_are_trained() -> None:
    assert trained_text("a 語 b", "語", in_order=True) == trained_text("a 語 b", "語", in_order=False) == "語"


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.lists(PIECES, max_size=12).map("".join), st.data())
def test_library_lookup_of_one_span_equals_the_search(name: str, text: str, data: st.DataObject) -> None:
    """The library looks tokens up where its offsets are known to ascend; otherwise the offsets are searched."""
    places = st.integers(0, len(text))
    start, end = sorted((data.draw(places), data.draw(places)))
    encoding = encode(TOKENIZERS[name], text)
    looked_up, searched = (
        trained_tokens(encoding, text, [(start, end)], special_ids=SPECIAL, stop_ids=STOP, in_order=in_order)
        for in_order in (True, False)
    )
    assert looked_up == searched


def test_descending_offsets_are_replaced_by_running_extremes() -> None:
    starts, ends = _ascending([(0, 1), (4, 6), (1, 4), (6, 7)])
    assert (list(starts), list(ends)) == ([0, 1, 1, 6], [1, 6, 6, 7])
    starts, ends = _ascending([(0, 1), (1, 4), (1, 4), (4, 6)])
    assert (list(starts), list(ends)) == ([0, 1, 1, 4], [1, 4, 4, 6])
