"""Tokens as they are generated → text that can be shown at once: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no character, also for the first bytes of one."""


class TextStream:
    """The text of a growing list of tokens, special tokens left out, cut before the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # Text up to `_read` has been taken over; it is decoded anew from `_start` on, since a tokenizer may write a
        # token differently where text begins.
        self._start = self._read = 0
        self._held = ""
        self.stopped = False
        """A stop string came."""

    def add(self, token_id: int) -> str:
        """The text that can be shown now; "" while a character or a stop string may be in the making."""
        self._ids.append(token_id)
        text = self._decode(self._ids[self._start :])
        known = self._decode(self._ids[self._start : self._read])
        if text.endswith(REPLACEMENT) or len(text) <= len(known):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._show(text[len(known) :])

    def end(self) -> str:
        """The text that was held back, now that no token follows."""
        known = self._decode(self._ids[self._start : self._read])
        rest = self._show(self._decode(self._ids[self._start :])[len(known) :])
        shown, self._held = self._held, ""
        return rest if self.stopped else rest + shown

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _show(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = max((_begun(self._held, stop) for stop in self._stop), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown


def _begun(text: str, stop: str) -> int:
    """How many of the text's last characters are the first ones of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
