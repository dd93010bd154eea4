"""Rows to token ids with a loss mask. No torch: previews, checks and the trainer share this path."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar

from tokenizers import Encoding

from qlora_service.data.rendering.chat_template import Span
from qlora_service.data.rendering.loss_mask import trained_tokens
from qlora_service.data.rendering.prompt_format import cut_seams, with_turns
from qlora_service.data.rendering.stop_tokens import StopTokens, TrainedEnds, base_stop_ids, eos_token_id, special_ids
from qlora_service.data.rendering.template_process import RenderedChat, TemplateProcess
from qlora_service.data.rendering.tokenizer_file import load_tokenizer, token_text
from qlora_service.data.rendering.tokenizer_settings import PLAIN_TEMPLATE, read_tokenizer_settings
from qlora_service.data.rendering.unknown_tokens import unknown_token
from qlora_service.data.rows.examples import (
    Chat,
    Completion,
    Document,
    LabeledAnswer,
    Preference,
    SourceRow,
    documents,
)
from qlora_service.errors import Finding, InvalidModel
from qlora_service.specs import Training

TEMPLATE_ROWS = 64
"""Rows per request to the template process, which has a time limit."""
TOKENIZER_ROWS = 256
"""Rows tokenized at a time, on all cores."""
# Tokenizing needs 100 to 600 bytes per token, and a character may be three tokens: at most about 0.3 GB.
BATCH_CHARS = 1 << 18

Item = TypeVar("Item")
RowTexts = tuple[SourceRow, list[RenderedChat]]
"""A row, with the text and the trained character spans of each of its documents."""
Encoded = tuple[Encoding, bool]
"""The tokens of a text, and whether the whole text is tokenized."""

NO_END = (
    "the chat template writes no token that ends the last answer: the model is not taught to stop there; "
    "import the model with a template that writes one"
)


@dataclass(frozen=True)
class RenderRules:
    """Rules for rendering rows to tokens; see the fields of the same names in `specs.Training`."""

    max_seq_len_tokens: int
    too_long: Literal["refuse", "truncate", "drop"] = "refuse"
    train_on: Literal["assistant", "all"] = "assistant"
    prompt_format: Literal["auto", "chat", "plain"] = "auto"

    @classmethod
    def of(cls, training: Training) -> RenderRules:
        """The rules in a job's configuration."""
        return cls(training.max_seq_len_tokens, training.too_long, training.train_on, training.prompt_format)


@dataclass(frozen=True)
class RenderedRow:
    """Token ids of one example. `trained[i]`: whether token i is trained, predicted from the tokens before it."""

    line: int
    text: str
    input_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    cut_tokens: int = 0
    """Tokens that truncation cut off the end; of a very long text, only the tokenized part is counted."""
    rejected: RenderedRow | None = None
    """The rejected answer's document of a preference pair; the row itself is the chosen answer's document."""
    desirable: bool | None = None
    """The label of a labeled answer."""
    has_plain_prompt: bool = False
    """Prompt and answer are plain text, without a template"""
    warnings: tuple[Finding, ...] = ()
    """Parts of the row that are not trained, or not as one would expect"""

    @property
    def trained_tokens(self) -> int:
        """Number of tokens with a loss. The first token of a row never has a loss: no token precedes it."""
        return sum(self.trained[1:])


@dataclass(frozen=True)
class UnusableRow:
    """A row that is not trained. `too_long`: the row's length, or a lower bound (see `_encode`), if it is too long."""

    finding: Finding
    too_long: int | None = None
    unknown_token: bool = False
    """Whether the base has no embedding for one of its tokens"""


class Renderer:
    """Renders rows to token ids with a base model's tokenizer and chat template. A context manager."""

    def __init__(self, model_dir: Path, rules: RenderRules, now: datetime, *, embeddings: int | None = None) -> None:
        """`embeddings`: rows of the base's embedding; a row with a token beyond them is unusable."""
        self._rules = rules
        self._embeddings = embeddings
        settings = read_tokenizer_settings(model_dir)
        self._tokenizer = load_tokenizer(model_dir / "tokenizer.json")
        tokens = dict(settings.special_tokens)
        self._eos = eos_token_id(settings, self._tokenizer)
        if self._eos is not None:
            tokens["eos_token"] = self._tokenizer.id_to_token(self._eos) or ""
        self._stop_ids = base_stop_ids(settings, self._tokenizer)
        self._ends = TrainedEnds(self._tokenizer, self._stop_ids)
        self._in_order = self._tokenizer.normalizer is None
        self._special_ids = special_ids(self._tokenizer)
        bos = self._token_id(tokens.get("bos_token"))
        if bos is None and settings.bos_token_id is not None:
            bos = settings.bos_token_id
            tokens["bos_token"] = self._tokenizer.id_to_token(bos) or ""
        (prefix,) = self._encodings([""], add_special_tokens=True)
        self._bos = bos if bos is not None and prefix.ids[:1] == [bos] else None
        tokens.setdefault("eos_token", "")
        plain = ("{{ bos_token }}" if self._bos is not None else "") + PLAIN_TEMPLATE
        self.chat_template: str = settings.chat_template or plain
        """The template in use: the model's template, or `PLAIN_TEMPLATE` without one."""
        has_turns = settings.has_own_template if rules.prompt_format == "auto" else rules.prompt_format == "chat"
        self._with_turns = with_turns if has_turns else None
        self._templates = TemplateProcess(self.chat_template, tokens, now)

    def __enter__(self) -> Renderer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._templates.__exit__(kind, error, trace)

    def render(self, rows: Iterable[SourceRow]) -> Iterator[RenderedRow | UnusableRow]:
        """One result per row, in order.

        Raises:
            InvalidModel: the chat template or the tokenizer cannot be used for any row.
            InvalidDataset: the chat template fails on too many rows.
        """
        if self._with_turns is not None:
            rows = map(self._with_turns, rows)
        batches = _batches(
            self._row_texts(rows), lambda row: sum(len(rendered.text) for rendered in row[1]), TOKENIZER_ROWS
        )
        for batch, tokens in self._encode_ahead(batches):
            encoded = iter(tokens)
            for row, texts in batch:
                row_tokens = list(islice(encoded, len(texts)))
                sides = [
                    self._tokenized(row, document, rendered, *tokens)
                    for document, rendered, tokens in zip(documents(row.example), texts, row_tokens, strict=True)
                ]
                yield self._with_prompt(row, row_tokens, _merged(row, *sides))

    def token_text(self, token_id: int) -> str:
        """The text of a token by itself, see `tokenizer_file.token_text`."""
        return token_text(self._tokenizer, token_id)

    def token_spans(self, document: RenderedRow) -> list[Span | None]:
        """The characters of the document's text that each token has a part of; None for a token that was added."""
        encoding, _ = self._encode_prefix(document.text)
        has_bos = document.input_ids[:1] != tuple(encoding.ids[:1])
        spans: list[Span | None] = [None] * has_bos + encoding.offsets
        length = len(document.input_ids)
        return spans[:length] + [None] * (length - len(spans))

    def stop_tokens(self) -> StopTokens:
        """Tokens that end an answer; of trained answers, those that were rendered so far."""
        return self._ends.stop_tokens(self.chat_template, self._templates)

    def _row_texts(self, rows: Iterable[SourceRow]) -> Iterator[RowTexts]:
        batches = _batches(rows, _characters, TEMPLATE_ROWS)
        for batch, rendered in self._templates.render_ahead((batch, _chats(batch)) for batch in batches):
            rendered_chats = iter(rendered)
            for row in batch:
                yield row, [_text_of(document, rendered_chats) for document in documents(row.example)]

    def _encode_ahead(self, batches: Iterable[list[RowTexts]]) -> Iterator[tuple[list[RowTexts], list[Encoded]]]:
        """Each batch with the tokens of its texts; a thread tokenizes the next batch, which needs no Python lock."""
        pending: deque[tuple[list[RowTexts], Future[list[Encoded]]]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as thread:
            for batch in batches:
                batch_texts = [rendered.text for _, texts in batch for rendered in texts]
                pending.append((batch, thread.submit(self._encode, batch_texts)))
                if len(pending) > 1:
                    encoded_batch, tokens = pending.popleft()
                    yield encoded_batch, tokens.result()
            for encoded_batch, tokens in pending:
                yield encoded_batch, tokens.result()

    def _encode(self, texts: list[str]) -> list[Encoded]:
        """The tokens of each text, and whether the whole text is tokenized: of a very long text, only a prefix is.

        The prefix has over twice the tokens that a row may have: the text after it changes only its last few tokens.
        """
        if sum(map(len, texts)) <= BATCH_CHARS:
            return [(encoding, True) for encoding in self._encodings(texts)]
        return [self._encode_prefix(text) for text in texts]

    def _encode_prefix(self, text: str) -> Encoded:
        size, limit = BATCH_CHARS, 2 * self._rules.max_seq_len_tokens
        while True:
            (encoding,) = self._encodings([text[:size]])
            if size >= len(text) or len(encoding.ids) > limit:
                return encoding, size >= len(text)
            size *= 2

    def _encodings(self, texts: list[str], add_special_tokens: bool = False) -> list[Encoding]:
        try:
            encodings: list[Encoding] = self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
            raise InvalidModel(
                f"the base model's tokenizer.json cannot tokenize ({error}): import the model with a working tokenizer",
                location="/base_model",
            ) from None
        return encodings

    def _tokenized(
        self, row: SourceRow, document: Document, rendered: RenderedChat, encoding: Encoding, is_whole: bool
    ) -> RenderedRow | UnusableRow:
        """The token ids of one of the row's documents."""
        if rendered.error is not None:
            return _unusable(row, rendered.error)
        ids: list[int] = encoding.ids
        trained = trained_tokens(
            encoding,
            rendered.text,
            rendered.spans,
            special_ids=self._special_ids,
            stop_ids=self._stop_ids,
            in_order=self._in_order,
        )
        is_chat = isinstance(document, Chat)
        if not is_chat and self._bos is not None and ids[:1] != [self._bos]:
            ids, trained = [self._bos, *ids], [False, *trained]
        warnings = _warnings(row, document, rendered)
        if self._eos is not None and ids and trained[-1] and ids[-1] not in self._end_ids(is_chat):
            if is_chat and not self._special_ids.isdisjoint(ids[1:]):
                # The ids are those of transformers, because the model has learned its template's turns.
                warnings.append(Finding(NO_END, line=row.line, byte_offset=row.byte_offset))
            else:
                # Without a trained stop token after its answers, the adapter would never stop generating.
                ids, trained = [*ids, self._eos], [*trained, True]
        answers = trained
        # The objectives for rated answers do not use the tokens of the prompt.
        if self._rules.train_on == "all" and not isinstance(row.example, Preference | LabeledAnswer):
            trained = [True] * len(ids)
        limit = self._rules.max_seq_len_tokens
        cut = max(0, len(ids) - limit)
        if cut and self._rules.too_long != "truncate":
            length = f"{len(ids)}" if is_whole else f"over {len(ids)}"
            return _unusable(row, f"{length} tokens long; max_seq_len_tokens is {limit}", too_long=len(ids))
        if (problem := unknown_token(ids[:limit], self._tokenizer, self._embeddings)) is not None:
            return _unusable(row, problem, unknown_token=True)
        kept = tuple(ids[:limit]), tuple(trained[:limit])
        result = RenderedRow(row.line, rendered.text, *kept, cut, warnings=tuple(warnings))
        if result.trained_tokens == 0:
            return _unusable(row, f"nothing to train: {_no_answer(rendered, cut)}")
        self._ends.add(result.input_ids, answers[:limit], is_cut=cut > 0)
        return result

    def _end_ids(self, is_chat: bool) -> Set[int]:
        """Tokens that end an answer: a template ends it with any special token, plain text only with a stop token."""
        return self._special_ids | self._stop_ids if is_chat else self._stop_ids

    def _with_prompt(
        self, row: SourceRow, tokens: list[Encoded], result: RenderedRow | UnusableRow
    ) -> RenderedRow | UnusableRow:
        """The result; that of a plain prompt is marked, and has a warning if a token straddles the prompt's end."""
        if isinstance(result, UnusableRow) or not isinstance(documents(row.example)[0], Completion):
            return result
        is_masked = self._rules.train_on == "assistant"
        warnings = cut_seams(row, [encoding for encoding, _ in tokens]) if is_masked else ()
        return replace(result, has_plain_prompt=True, warnings=result.warnings + warnings)

    def _token_id(self, token: str | None) -> int | None:
        token_id: int | None = None if token is None else self._tokenizer.token_to_id(token)
        return token_id


def _warnings(row: SourceRow, document: Document, rendered: RenderedChat) -> list[Finding]:
    """What is not trained as one would expect: of the row's form, and of the template's rendering."""
    warnings = list(row.warnings)
    pointers = document.text_pointers if isinstance(document, Chat) else ()
    for message, pointer, reason in rendered.warnings:
        text_pointer = pointers[message] if message is not None and pointers else ""
        place = text_pointer if pointer.startswith("/content") else text_pointer.rpartition("/")[0] + pointer
        warnings.append(Finding(reason, place, row.line, row.byte_offset))
    return warnings


def _no_answer(rendered: RenderedChat, cut_tokens: int) -> str:
    """The reason why no token of a row is trained."""
    if not rendered.spans and rendered.warnings:
        return rendered.warnings[0].reason
    after = f" after {cut_tokens} tokens were cut off" if cut_tokens else ""
    return f"no token of an answer is left{after}"


def _unusable(row: SourceRow, reason: str, too_long: int | None = None, unknown_token: bool = False) -> UnusableRow:
    return UnusableRow(Finding(reason=reason, line=row.line, byte_offset=row.byte_offset), too_long, unknown_token)


def _chats(rows: Iterable[SourceRow]) -> list[Chat]:
    return [document for row in rows for document in documents(row.example) if isinstance(document, Chat)]


def _text_of(document: Document, rendered_chats: Iterator[RenderedChat]) -> RenderedChat:
    if isinstance(document, Chat):
        return next(rendered_chats)
    if isinstance(document, Completion):
        text = document.prompt + document.completion
        return RenderedChat(text, ((len(document.prompt), len(text)),))
    return RenderedChat(document.text, ((0, len(document.text)),))


def _merged(
    row: SourceRow, first: RenderedRow | UnusableRow, second: RenderedRow | UnusableRow | None = None
) -> RenderedRow | UnusableRow:
    """One result from the results of the row's documents: both sides of a pair, or a single document."""
    if second is None:
        if isinstance(row.example, LabeledAnswer) and isinstance(first, RenderedRow):
            return replace(first, desirable=row.example.desirable)
        return first
    if isinstance(first, UnusableRow) or isinstance(second, UnusableRow):
        sides = (("chosen", first), ("rejected", second))
        unusable = {name: side for name, side in sides if isinstance(side, UnusableRow)}
        reason = "; ".join(f"the {name} answer: {side.finding.reason}" for name, side in unusable.items())
        lengths = [side.too_long for side in unusable.values() if side.too_long is not None]
        is_unknown = any(side.unknown_token for side in unusable.values())
        return _unusable(row, reason, too_long=max(lengths, default=None), unknown_token=is_unknown)
    if first.input_ids == second.input_ids:
        after = " after truncation" if first.cut_tokens or second.cut_tokens else ""
        return _unusable(row, f"the chosen and the rejected answer are the same tokens{after}")
    return replace(first, rejected=second, warnings=tuple(dict.fromkeys(first.warnings + second.warnings)))


def _characters(row: SourceRow) -> int:
    return sum(document.characters for document in documents(row.example))


def _batches(items: Iterable[Item], size: Callable[[Item], int], max_items: int) -> Iterator[list[Item]]:
    """Batches in order, of at most `max_items` items and `BATCH_CHARS` in total; a larger item is a batch by itself."""
    batch: list[Item] = []
    total = 0
    for item in items:
        added = size(item)
        if batch and (len(batch) == max_items or total + added > BATCH_CHARS):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += added
    if batch:
        yield batch
