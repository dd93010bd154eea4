"""Text that is shown while tokens come."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from qlora_service.chat.text import TextStream
from tests.tiny_model import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


def shown(tokenizer: Tokenizer, text: str, stop: tuple[str, ...] = ()) -> list[str]:
    """The pieces in which the text would be shown, without the empty ones."""
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
def test_the_pieces_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert "".join(shown(tokenizer, text)) == text


def test_no_piece_ends_within_a_character(tokenizer: Tokenizer) -> None:
    pieces = shown(tokenizer, "👍東")
    assert len(tokenizer.encode("👍東", add_special_tokens=False).ids) > len(pieces)
    assert pieces == ["👍", "東"]


def test_bytes_that_never_become_a_character_are_shown_at_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    first_of_two = tokenizer.encode("é", add_special_tokens=False).ids[:1]
    if tokenizer.decode(first_of_two) == "é":  # the tokenizer has it whole
        first_of_two = tokenizer.encode("👍", add_special_tokens=False).ids[:1]
    assert stream.add(first_of_two[0]) == ""
    assert stream.end() == "�"


def test_special_tokens_are_not_shown(tokenizer: Tokenizer) -> None:
    assert "".join(shown(tokenizer, "Paris.<|im_end|>")) == "Paris."


@pytest.mark.parametrize("stop", ["France", " of Fr", "."])
def test_nothing_is_shown_of_a_stop_string_nor_behind_it(tokenizer: Tokenizer, stop: str) -> None:
    text = "The capital of France is Paris. Yes."
    pieces = shown(tokenizer, text, (stop,))
    assert "".join(pieces) == text.partition(stop)[0]


def test_nothing_is_shown_of_a_stop_string_that_comes_letter_by_letter(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ("END",))
    letters = [tokenizer.encode(letter, add_special_tokens=False).ids for letter in "an ENEND"]
    pieces = [stream.add(token_id) for (token_id,) in letters]
    assert stream.stopped
    assert pieces == ["a", "n", " ", "", "", "EN", "", ""]


def test_the_first_of_several_stop_strings_counts(tokenizer: Tokenizer) -> None:
    assert "".join(shown(tokenizer, "one two three four", ("three", "two"))) == "one "
    # Both are there at once.
    assert "".join(shown(tokenizer, "xab", ("b", "ab"))) == "x"


def test_what_only_began_like_a_stop_string_is_shown(tokenizer: Tokenizer) -> None:
    text = "a story about a river"
    assert "".join(shown(tokenizer, text, ("river and",))) == text
    assert "".join(shown(tokenizer, text, ("a stork",))) == text
