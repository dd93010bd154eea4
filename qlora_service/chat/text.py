"""Incremental detokenization: text that can be sent at once, in whole characters and without stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
"""Written by a decoder for bytes that are not a character, including an incomplete one"""


class TextStream:
    """The text of a growing list of tokens, special tokens left out, cut before the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # The text of the tokens before `_read` was emitted. Decoding restarts at `_start`, some tokens earlier, because
        # a tokenizer may decode a token differently at the beginning of a text.
        self._start = self._read = 0
        self._held = ""
        self.stopped = False
        """Whether a stop string has occurred"""

    def add(self, token_id: int) -> str:
        """The text that can be emitted now; "" while a character or a stop string may be incomplete."""
        self._ids.append(token_id)
        text = self._decode(self._ids[self._start :])
        emitted = self._decode(self._ids[self._start : self._read])
        if text.endswith(REPLACEMENT) or len(text) <= len(emitted):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._emit(text[len(emitted) :])

    def end(self) -> str:
        """The text that was held back, after the last token."""
        emitted = self._decode(self._ids[self._start : self._read])
        rest = self._emit(self._decode(self._ids[self._start :])[len(emitted) :])
        held, self._held = self._held, ""
        return rest if self.stopped else rest + held

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _emit(self, text: str) -> str:
        """The part of the held and new text that is before a stop string and cannot be the beginning of one."""
        if self.stopped:
            return ""
        self._held += text
        positions = [position for stop in self._stop if (position := self._held.find(stop)) >= 0]
        if positions:
            self.stopped = True
            return self._held[: min(positions)]
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        emitted = self._held[: len(self._held) - keep]
        self._held = self._held[len(emitted) :]
        return emitted


def _overlap(text: str, stop: str) -> int:
    """The number of characters at the end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
