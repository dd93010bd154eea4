"""Rows → token ids, and which of them are trained. No torch: previews, checks and the trainer share this path."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

from tokenizers import Encoding, Tokenizer

from qlora_service.data.chat_template import Span
from qlora_service.data.checks import MAX_FINDINGS
from qlora_service.data.examples import Chat, Completion, Example, SourceRow
from qlora_service.data.template_process import RenderedChat, TemplateProcess, characters
from qlora_service.data.tokenizer_settings import read_tokenizer_settings
from qlora_service.errors import Finding, InvalidModel
from qlora_service.specs import Training

BATCH_ROWS = 64
# Tokenizing holds 100 to 600 bytes for each token, and a character may be three tokens: some 0.3 GB at the worst.
BATCH_CHARS = 1 << 18

Item = TypeVar("Item")

# For base models that bring no template of their own; stored with the adapter, so that it is used at inference too.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ '### Response:\\n' + message.content + eos_token }}"
    "{% elif message.role == 'user' %}{{ '### Instruction:\\n' + message.content + '\\n\\n' }}"
    "{% else %}{{ message.content + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class RenderRules:
    """How rows become tokens; see the fields of the same names in `specs.Training`."""

    max_seq_len_tokens: int
    too_long: Literal["refuse", "truncate", "drop"] = "refuse"
    train_on: Literal["assistant", "all"] = "assistant"

    @classmethod
    def of(cls, training: Training) -> RenderRules:
        """The rules a job's configuration asks for."""
        return cls(training.max_seq_len_tokens, training.too_long, training.train_on)


@dataclass(frozen=True)
class RenderedRow:
    """Token ids of one example. `trained[i]` says whether token i is learned (predicted from those before it)."""

    line: int
    text: str
    input_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    cut_tokens: int = 0
    """Tokens that truncation took off the end; of an enormous text, only those that were counted."""

    @property
    def trained_tokens(self) -> int:
        """Tokens with a loss. The first token of a row is predicted from nothing and never has one."""
        return sum(self.trained[1:])


@dataclass(frozen=True)
class UnusableRow:
    """Why a row is not trained on. `too_long` is its length when that is the reason, at least (see `_encode`)."""

    finding: Finding
    too_long: int | None = None


class Renderer:
    """Turns rows into token ids with a base model's tokenizer and chat template. A context manager."""

    def __init__(self, model_dir: Path, rules: RenderRules, now: datetime) -> None:
        self._rules = rules
        settings = read_tokenizer_settings(model_dir)
        self._tokenizer = _load_tokenizer(model_dir / "tokenizer.json")
        tokens = dict(settings.special_tokens)
        self._eos = self._token_id(tokens.get("eos_token"))
        if self._eos is None and settings.eos_token_ids:
            self._eos = min(settings.eos_token_ids)
            tokens["eos_token"] = self._tokenizer.id_to_token(self._eos) or ""
        self._stop_ids = settings.eos_token_ids | ({self._eos} if self._eos is not None else set())
        self._special_ids = {
            token_id for token_id, added in self._tokenizer.get_added_tokens_decoder().items() if added.special
        }
        bos = self._token_id(tokens.get("bos_token"))
        if bos is None and settings.bos_token_id is not None:
            bos = settings.bos_token_id
            tokens["bos_token"] = self._tokenizer.id_to_token(bos) or ""
        (prefix,) = self._encodings([""], add_special_tokens=True)
        self._bos = bos if bos is not None and prefix.ids[:1] == [bos] else None
        tokens.setdefault("eos_token", "")
        plain = ("{{ bos_token }}" if self._bos is not None else "") + PLAIN_TEMPLATE
        self.chat_template: str = settings.chat_template or plain
        """The template in use: the model's, else `PLAIN_TEMPLATE`."""
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
            InvalidModel: the chat template or the tokenizer cannot be used at all.
            InvalidDataset: the chat template fails on too many rows.
        """
        for drafts in _batches(self._drafts(rows), lambda draft: len(draft[1].text)):
            encodings = self._encode([draft.text for _, draft in drafts])
            for (row, draft), (encoding, is_whole) in zip(drafts, encodings, strict=True):
                if draft.error is not None:
                    yield _unusable(row, draft.error)
                else:
                    yield self._finish(row, draft, encoding, is_whole)

    def token_text(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def _drafts(self, rows: Iterable[SourceRow]) -> Iterator[tuple[SourceRow, RenderedChat]]:
        """Each row with its text and its trained character spans."""
        for batch in _batches(rows, lambda row: _characters(row.example)):
            chats = [row.example for row in batch if isinstance(row.example, Chat)]
            rendered_chats = iter(self._templates.render(chats)) if chats else iter(())
            for row in batch:
                yield row, self._draft(row, rendered_chats)

    def _draft(self, row: SourceRow, rendered_chats: Iterator[RenderedChat]) -> RenderedChat:
        example = row.example
        if isinstance(example, Chat):
            return next(rendered_chats)
        if isinstance(example, Completion):
            text = example.prompt + example.completion
            return RenderedChat(text, ((len(example.prompt), len(text)),))
        return RenderedChat(example.text, ((0, len(example.text)),))

    def _encode(self, texts: list[str]) -> list[tuple[Encoding, bool]]:
        """The tokens of each text, and whether they are all: of an enormous one only the beginning is tokenized.

        That beginning has over twice the tokens a row may have: text that follows changes no more than the last few.
        """
        if len(texts) > 1:
            return [(encoding, True) for encoding in self._encodings(texts)]
        (text,) = texts
        size, limit = BATCH_CHARS, 2 * self._rules.max_seq_len_tokens
        while True:
            (encoding,) = self._encodings([text[:size]])
            if size >= len(text) or len(encoding.ids) > limit:
                return [(encoding, size >= len(text))]
            size *= 2

    def _encodings(self, texts: list[str], add_special_tokens: bool = False) -> list[Encoding]:
        try:
            encodings: list[Encoding] = self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
            raise InvalidModel(
                f"the base model's tokenizer.json cannot tokenize ({error}): import the model with a sound one",
                location="/base_model",
            ) from None
        return encodings

    def _finish(
        self, row: SourceRow, draft: RenderedChat, encoding: Encoding, is_whole: bool
    ) -> RenderedRow | UnusableRow:
        ids: list[int] = encoding.ids
        trained = self._trained_tokens(draft, encoding)
        is_chat = isinstance(row.example, Chat)
        if not is_chat and self._bos is not None and ids[:1] != [self._bos]:
            ids, trained = [self._bos, *ids], [False, *trained]
        # A template ends a turn with a special token of its choice; plain text ends with nothing else than a stop.
        closing = self._special_ids if is_chat else self._stop_ids
        ends_open = bool(ids) and trained[-1] and ids[-1] not in closing
        if self._eos is not None and ends_open:
            # Nothing ends the last answer: without a learned stop token the adapter would never stop.
            ids, trained = [*ids, self._eos], [*trained, True]
        if self._rules.train_on == "all":
            trained = [True] * len(ids)
        limit = self._rules.max_seq_len_tokens
        cut = max(0, len(ids) - limit)
        if cut and self._rules.too_long != "truncate":
            length = f"{len(ids)}" if is_whole else f"over {len(ids)}"
            return _unusable(row, f"{length} tokens long; max_seq_len_tokens is {limit}", too_long=len(ids))
        result = RenderedRow(row.line, draft.text, tuple(ids[:limit]), tuple(trained[:limit]), cut)
        if result.trained_tokens == 0:
            after = f" after {cut} tokens were cut off" if cut else ""
            return _unusable(row, f"nothing to train: no token of an answer is left{after}")
        return result

    def _trained_tokens(self, draft: RenderedChat, encoding: Encoding) -> list[bool]:
        """Which tokens overlap a trained span; each span ends with its stop token, if it has one."""
        ids: list[int] = encoding.ids
        offsets: list[Span] = encoding.offsets
        # Offsets go forward, but for tokenizers that reorder characters; these two always do.
        ends = list(accumulate((end for _, end in offsets), max))
        starts = list(accumulate((start for start, _ in reversed(offsets)), min))[::-1]
        special = [index for index, token_id in enumerate(ids) if token_id in self._special_ids]
        changes = [0] * (len(ids) + 1)
        for start, end in draft.spans:
            first, last = bisect_right(ends, start), bisect_left(starts, end) - 1
            if first > last:
                continue
            place = bisect_right(special, last) - 1
            ending = special[place] if place >= 0 and special[place] >= first else None
            stop_follows = last + 1 < len(ids) and ids[last + 1] in self._stop_ids
            if stop_follows and (ending is None or ids[ending] not in self._stop_ids):
                last += 1
            elif ending is not None and draft.text[offsets[ending][1] : end].isspace():
                # Behind the stop token a template may put a line break that is never generated.
                last = ending
            changes[first] += 1
            changes[last + 1] -= 1
        return [depth > 0 for depth in accumulate(changes[:-1])]

    def _token_id(self, token: str | None) -> int | None:
        token_id: int | None = None if token is None else self._tokenizer.token_to_id(token)
        return token_id


@dataclass
class RenderReport:
    """What rendering a dataset gave: counts, the lengths' histogram, and the rows that cannot be used."""

    rows: int = 0
    usable_rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest_tokens: int = 0
    cut_rows: int = 0
    """Usable rows that lost tokens to truncation."""
    too_long_rows: int = 0
    complete: bool = True
    """False when only the first rows were rendered."""
    histogram: dict[str, int] = field(default_factory=dict)
    """Rows by length: key "128" counts rows of 65 to 128 tokens."""
    finding_count: int = 0
    findings: list[dict[str, Any]] = field(default_factory=list)

    def add(self, result: RenderedRow | UnusableRow) -> None:
        self.rows += 1
        if isinstance(result, UnusableRow):
            self.finding_count += 1
            if len(self.findings) < MAX_FINDINGS:
                self.findings.append(result.finding.as_dict())
            if result.too_long is not None:
                self.too_long_rows += 1
                self._count_length(result.too_long)
            return
        self.usable_rows += 1
        self.cut_rows += bool(result.cut_tokens)
        self.tokens += len(result.input_ids)
        self.trained_tokens += result.trained_tokens
        self._count_length(len(result.input_ids) + result.cut_tokens)

    def _count_length(self, tokens: int) -> None:
        self.longest_tokens = max(self.longest_tokens, tokens)
        upto = str(1 << max(3, (tokens - 1).bit_length()))
        self.histogram[upto] = self.histogram.get(upto, 0) + 1


def render_report(renderer: Renderer, rows: Iterable[SourceRow], max_rows: int) -> RenderReport:
    """What the first `max_rows` rows give."""
    report = RenderReport()
    iterator = iter(rows)
    for result in renderer.render(islice(iterator, max_rows)):
        report.add(result)
    report.complete = next(iterator, None) is None
    report.histogram = dict(sorted(report.histogram.items(), key=lambda item: int(item[0])))
    return report


def _unusable(row: SourceRow, reason: str, too_long: int | None = None) -> UnusableRow:
    return UnusableRow(Finding(reason=reason, line=row.line, byte_offset=row.byte_offset), too_long)


def _batches(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """The items in order, at most `BATCH_ROWS` at a time and `BATCH_CHARS` in all; a larger one comes alone."""
    batch: list[Item] = []
    total = 0
    for item in items:
        added = size(item)
        if batch and (len(batch) == BATCH_ROWS or total + added > BATCH_CHARS):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += added
    if batch:
        yield batch


def _characters(example: Example) -> int:
    if isinstance(example, Chat):
        return characters([example.messages, example.tools])
    if isinstance(example, Completion):
        return len(example.prompt) + len(example.completion)
    return len(example.text)


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise InvalidModel(f"the base model's tokenizer.json cannot be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
