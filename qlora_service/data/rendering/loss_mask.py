"""Loss mask: the trained tokens of a text, from the character spans of its answers."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence, Set
from itertools import accumulate

from tokenizers import Encoding

from qlora_service.data.rendering.chat_template import Span


def trained_tokens(
    encoding: Encoding,
    text: str,
    spans: Sequence[Span],
    *,
    special_ids: Set[int],
    stop_ids: Set[int],
    in_order: bool,
) -> list[bool]:
    """For every token of the text, whether it overlaps a span; each span ends with its stop token, if it has one.

    `in_order`: the tokenizer cannot reorder characters, because it has no normalizer.
    """
    ids: list[int] = encoding.ids
    trained = [False] * len(ids)
    for first, last in _overlaps(encoding, spans, in_order):
        if first <= last:
            end = _turn_end(encoding, ids, text, (first, last), special_ids, stop_ids)
            trained[first : end + 1] = [True] * (end + 1 - first)
    return trained


def _turn_end(
    encoding: Encoding, ids: list[int], text: str, tokens: Span, special_ids: Set[int], stop_ids: Set[int]
) -> int:
    """The last token of an answer that the model generates; `tokens`: the first and the last token of its span.

    It is the first stop token of the special tokens at the span's end, or else the stop token after the span: the
    template may write more, such as a line break, a second stop token, or the header of the next turn.
    """
    first, last = tokens
    place, last_special, stop = last, None, None
    while place >= first and ((is_special := ids[place] in special_ids) or _is_space(encoding, text, place)):
        if is_special:
            last_special = place if last_special is None else last_special
            stop = place if ids[place] in stop_ids else stop
        place -= 1
    if stop is not None:
        return stop
    following = last + 1
    while following < len(ids) and ids[following] not in special_ids and _is_space(encoding, text, following):
        following += 1
    if following < len(ids) and ids[following] in stop_ids:
        return following
    return last if last_special is None else last_special


def _is_space(encoding: Encoding, text: str, token: int) -> bool:
    span = encoding.token_to_chars(token)
    return span is not None and text[slice(*span)].isspace()


def _overlaps(encoding: Encoding, spans: Sequence[Span], in_order: bool) -> list[tuple[int, int]]:
    """The first and the last token that overlap each span; the first is after the last where no token overlaps."""
    if in_order and len(spans) == 1:
        # The usual row, several times as fast, because the offsets are not copied out of the library.
        overlap = _overlap(encoding, *spans[0])
        if overlap is not None:
            return [overlap]
    starts, ends = _ascending(encoding.offsets)
    return [(bisect_right(ends, start), bisect_left(starts, end) - 1) for start, end in spans]


def _overlap(encoding: Encoding, start: int, end: int) -> tuple[int, int] | None:
    """The first and the last token of one span, or None where no token contains its first or its last character."""
    first, last = (encoding.char_to_token(start), encoding.char_to_token(end - 1)) if start < end else (None, None)
    if first is None or last is None:
        return None
    # Several tokens may be parts of one character.
    while last + 1 < len(encoding) and _token_span(encoding, last + 1)[0] < end:
        last += 1
    return first, last


def _token_span(encoding: Encoding, token: int) -> Span:
    """The characters of a token."""
    span = encoding.token_to_chars(token)
    assert span is not None, "a token without text"
    return span


def _ascending(offsets: list[Span]) -> tuple[Sequence[int], Sequence[int]]:
    """Ascending starts and ends of the tokens. Offsets ascend already, except in tokenizers that reorder characters."""
    starts, ends = zip(*offsets, strict=True) if offsets else ((), ())
    if list(ends) != sorted(ends):
        ends = tuple(accumulate(ends, max))
    if list(starts) != sorted(starts):
        starts = tuple(accumulate(reversed(starts), min))[::-1]
    return starts, ends
