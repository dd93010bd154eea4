"""Tokens that end an answer: the stop tokens of a base model, and the tokens that end trained answers.

Evaluation, chat and publication take them from here, so that an answer ends at the same token everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from qlora_service.data.rendering.template_process import TemplateProcess
from qlora_service.data.rendering.tokenizer_settings import TokenizerSettings, read_tokenizer_settings
from qlora_service.data.rows.examples import Chat
from qlora_service.errors import InvalidDataset, InvalidModel

_EXAMPLE = Chat(({"role": "user", "content": "Question?"}, {"role": "assistant", "content": "Answer."}), (False, True))


@dataclass(frozen=True)
class StopTokens:
    """Tokens that end an answer: their ids by their texts."""

    trained: dict[str, int]
    """Tokens that end the trained answers, the most frequent one first; empty if only ordinary text ends them"""
    base: dict[str, int]
    """Tokens that end generation in the settings of the base model"""
    template: dict[str, int]
    """The token that ends an answer in the chat template, if one does"""
    eos: str | None
    """The token to publish as the tokenizer's eos, if it is not that of the base"""

    @property
    def ids(self) -> tuple[int, ...]:
        """All of them, those that end trained answers first."""
        return tuple(dict.fromkeys([*self.trained.values(), *self.template.values(), *self.base.values()]))


def eos_token_id(settings: TokenizerSettings, tokenizer: Tokenizer) -> int | None:
    """The token named as eos; without a name, the lowest id that ends generation."""
    name = settings.special_tokens.get("eos_token")
    named: int | None = None if name is None else tokenizer.token_to_id(name)
    return min(settings.eos_token_ids, default=None) if named is None else named


def base_stop_ids(settings: TokenizerSettings, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end generation in the settings of a base model."""
    eos = eos_token_id(settings, tokenizer)
    return settings.eos_token_ids if eos is None else settings.eos_token_ids | {eos}


def directory_stop_ids(directory: Path) -> frozenset[int]:
    """Tokens that end generation in the settings of a base model or a published adapter. Raises: InvalidModel."""
    return base_stop_ids(read_tokenizer_settings(directory), Tokenizer.from_file(str(directory / "tokenizer.json")))


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def template_end(answer: str, tokenizer: Tokenizer) -> frozenset[int]:
    """The special token that ends a rendered answer; empty without one.

    It is the last special token before white space: after that, Phi-3's template writes the eos token once more.
    """
    special = special_ids(tokenizer)
    end: frozenset[int] = frozenset()
    is_before_space = True
    for token_id in reversed(tokenizer.encode(answer, add_special_tokens=False).ids):
        if token_id not in special:
            if tokenizer.decode([token_id], skip_special_tokens=False).strip():
                break
            is_before_space = True
        elif is_before_space:
            end, is_before_space = frozenset({token_id}), False
    return end


class TrainedEnds:
    """Collects the tokens that end trained answers: added tokens and stop tokens of the base, never ordinary text."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._special = special_ids(tokenizer) | stop_ids
        self._candidates = self._special.union(tokenizer.get_added_tokens_decoder())
        self._ends: Counter[int] = Counter()
        self._last: Counter[int] = Counter()
        self._inside: Counter[int] = Counter()

    def add(self, input_ids: Sequence[int], trained: Sequence[bool], *, is_cut: bool) -> None:
        """Counts the ends of a row's answers. `is_cut`: truncation removed the end of the row."""
        flags = bytes(trained)
        end = flags.rfind(1) + 1
        if end and not is_cut:
            self._last[input_ids[end - 1]] += 1
        while end:
            start = flags.rfind(0, 0, end) + 1
            if not is_cut or end < len(flags):
                self._ends[input_ids[end - 1]] += 1
            inside = input_ids[start : end - 1]
            if not self._candidates.isdisjoint(inside):
                self._inside.update(filter(self._candidates.__contains__, inside))
            end = flags.rfind(1, 0, start) + 1

    def ids(self) -> list[int]:
        """The tokens that end answers, the most frequent last token of a row first.

        A token that is found inside answers too ends none: gpt-oss writes <|end|> after a thought, and after the
        answers of earlier turns. A token that ends more rows is an end all the same: an answer may quote it. Added
        tokens that are not special, such as tags of tool calls, must end rows.
        """
        return sorted(filter(self._is_end, self._ends), key=lambda token_id: (-self._last[token_id], token_id))

    def stop_tokens(self, chat_template: str, templates: TemplateProcess) -> StopTokens:
        """These tokens, those of the base, and the one with which the chat template ends an answer."""
        try:
            (rendered,) = templates.render([_EXAMPLE])
        except (InvalidModel, InvalidDataset):  # of no consequence for rows of plain text
            end: frozenset[int] = frozenset()
        else:
            answer = rendered.text[rendered.spans[0][0] : rendered.spans[-1][1]] if rendered.spans else ""
            end = template_end(answer, self._tokenizer)
        trained = self._texts(self.ids())
        # Runtimes that read no generation settings stop at the tokenizer's eos. A template that writes the eos token
        # would render another text with another eos.
        is_new = self._stop_ids.isdisjoint(trained.values()) and "eos_token" not in chat_template
        eos = next(iter(trained), None) if is_new else None
        return StopTokens(trained, self._texts(sorted(self._stop_ids)), self._texts(end), eos)

    def _is_end(self, token_id: int) -> bool:
        inside = self._inside[token_id]
        ends_rows = token_id in self._candidates and self._last[token_id] > inside
        return ends_rows or (token_id in self._special and inside == 0)

    def _texts(self, token_ids: Iterable[int]) -> dict[str, int]:
        """The tokens that the tokenizer has; settings may name others."""
        texts = ((self._tokenizer.id_to_token(token_id), token_id) for token_id in token_ids)
        return {text: token_id for text, token_id in texts if text is not None}
