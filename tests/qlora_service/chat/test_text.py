"""Incremental detokenization."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from qlora_service.chat.text import TextStream
from tests.tiny_model import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


def streamed(tokenizer: Tokenizer, text: str, stop: tuple[str, ...] = ()) -> list[str]:
    """The pieces in which the text is emitted, without empty ones."""
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token_id in tokenizer.encode(text, add_special_tokens=False).ids:
        pieces.append(stream.add(token_id))
        if stream.stopped:
            break
    return [piece for piece in [*pieces, stream.end()] if piece]


@pytest.mark.parametrize(
    "text",
    [
        "The capital of France is Paris.",
        "Grüße, 東京 und 👩‍👩‍👧!",
        "  two  spaces\n\n\ttab ",
        "� is a character of its own",
        "",
    ],
)
def test_pieces_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert "".join(streamed(tokenizer, text)) == text


def test_pieces_contain_whole_characters(tokenizer: Tokenizer) -> None:
    pieces = streamed(tokenizer, "👍東")
    assert len(tokenizer.encode("👍東", add_special_tokens=False).ids) > len(pieces)
    assert pieces == ["👍", "東"]


def test_incomplete_character_is_emitted_at_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    first_ids = tokenizer.encode("é", add_special_tokens=False).ids[:1]
    if tokenizer.decode(first_ids) == "é":  # the character is one token
        first_ids = tokenizer.encode("👍", add_special_tokens=False).ids[:1]
    assert stream.add(first_ids[0]) == ""
    assert stream.end() == "�"


def test_special_tokens_are_not_emitted(tokenizer: Tokenizer) -> None:
    assert "".join(streamed(tokenizer, "Paris.<|im_end|>")) == "Paris."


@pytest.mark.parametrize("stop", ["France", " of Fr", "."])
def test_text_from_a_stop_string_on_is_not_emitted(tokenizer: Tokenizer, stop: str) -> None:
    text = "The capital of France is Paris. Yes."
    pieces = streamed(tokenizer, text, (stop,))
    assert "".join(pieces) == text.partition(stop)[0]


def test_stop_string_is_not_emitted_letter_by_letter(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ("END",))
    letters = [tokenizer.encode(letter, add_special_tokens=False).ids for letter in "an ENEND"]
    pieces = [stream.add(token_id) for (token_id,) in letters]
    assert stream.stopped
    assert pieces == ["a", "n", " ", "", "", "EN", "", ""]


def test_first_of_several_stop_strings_ends_the_text(tokenizer: Tokenizer) -> None:
    assert "".join(streamed(tokenizer, "one two three four", ("three", "two"))) == "one "
    # Both occur with the same token.
    assert "".join(streamed(tokenizer, "xab", ("b", "ab"))) == "x"


def test_prefix_of_a_stop_string_alone_is_emitted(tokenizer: Tokenizer) -> None:
    text = "a story about a river"
    assert "".join(streamed(tokenizer, text, ("river and",))) == text
    assert "".join(streamed(tokenizer, text, ("a stork",))) == text
