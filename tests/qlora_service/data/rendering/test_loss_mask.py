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


def changed(**parts: object) -> Tokenizer:
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


TOKENIZERS = {
    "byte level": TOKENIZER,
    "trimmed offsets": changed(post_processor=processors.ByteLevel(trim_offsets=True)),
    "spaces dropped": changed(
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


def words(text: str, *answers: str, in_order: bool = True) -> str:
    """The trained part of a text in which each answer is a span."""
    encoding = encode(TOKENIZER, text)
    spans = [(text.index(answer), text.index(answer) + len(answer)) for answer in answers]
    marks = trained_tokens(encoding, text, spans, special_ids=SPECIAL, stop_ids=STOP, in_order=in_order)
    ids = [token for token, on in zip(encoding.ids, marks, strict=True) if on]
    return str(TOKENIZER.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize("in_order", [True, False])
def test_a_span_takes_its_tokens_and_the_stop_token_behind_it(in_order: bool) -> None:
    text = "<|im_start|>question<|im_end|>\n<|im_start|>answer<|im_end|>\n"
    assert words(text, "answer", in_order=in_order) == "answer<|im_end|>"
    assert words(text, "answer<|im_end|>\n", in_order=in_order) == "answer<|im_end|>"
    assert words(text, "question", "answer", in_order=in_order) == "question<|im_end|>answer<|im_end|>"


def test_a_character_of_several_tokens_is_trained_whole() -> None:
    assert words("a 語 b", "語", in_order=True) == words("a 語 b", "語", in_order=False) == "語"


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.lists(PIECES, max_size=12).map("".join), st.data())
def test_one_span_is_found_as_among_many(name: str, text: str, data: st.DataObject) -> None:
    """Tokens are found in the library where its offsets are known to go forward, else by searching them."""
    places = st.integers(0, len(text))
    start, end = sorted((data.draw(places), data.draw(places)))
    encoding = encode(TOKENIZERS[name], text)
    fast, searched = (
        trained_tokens(encoding, text, [(start, end)], special_ids=SPECIAL, stop_ids=STOP, in_order=in_order)
        for in_order in (True, False)
    )
    assert fast == searched


def test_places_that_go_back_are_searched_by_the_furthest_reached() -> None:
    starts, ends = _ascending([(0, 1), (4, 6), (1, 4), (6, 7)])
    assert (list(starts), list(ends)) == ([0, 1, 1, 6], [1, 6, 6, 7])
    starts, ends = _ascending([(0, 1), (1, 4), (1, 4), (4, 6)])
    assert (list(starts), list(ends)) == ([0, 1, 1, 4], [1, 4, 4, 6])
