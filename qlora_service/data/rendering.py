"""Rows → token ids, and which of them are trained. No torch: previews, checks and the trainer share this path."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from tokenizers import Encoding, Tokenizer

from qlora_service.data.chat_template import Span
from qlora_service.data.examples import Chat, Completion, SourceRow
from qlora_service.data.template_process import RenderedChat, TemplateProcess
from qlora_service.errors import Finding, InvalidModel
from qlora_service.specs import Training

BATCH_ROWS = 64
MAX_FINDINGS = 100

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
    """Tokens that truncation took off the end."""

    @property
    def trained_tokens(self) -> int:
        """Tokens with a loss. The first token of a row is predicted from nothing and never has one."""
        return sum(self.trained[1:])


@dataclass(frozen=True)
class UnusableRow:
    """Why a row is not trained on. `too_long` is its length when that is the reason."""

    finding: Finding
    too_long: int | None = None


class Renderer:
    """Turns rows into token ids with a base model's tokenizer and chat template. A context manager."""

    def __init__(self, model_dir: Path, rules: RenderRules, now: datetime) -> None:
        self._rules = rules
        config = _read_json(model_dir / "tokenizer_config.json")
        self._tokenizer = _load_tokenizer(model_dir / "tokenizer.json")
        tokens = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in config.items()
            if key.endswith("_token") and isinstance(value, str | dict)
        }
        self._eos = self._token_id(tokens.get("eos_token"))
        self._stop_ids = _stop_ids(model_dir, self._eos)
        self._special_ids = {
            token_id for token_id, added in self._tokenizer.get_added_tokens_decoder().items() if added.special
        }
        bos = self._token_id(tokens.get("bos_token"))
        prefix = self._tokenizer.encode("", add_special_tokens=True).ids
        self._bos = bos if bos is not None and prefix[:1] == [bos] else None
        tokens.setdefault("eos_token", "")
        plain = ("{{ bos_token }}" if self._bos is not None else "") + PLAIN_TEMPLATE
        self.chat_template: str = _chat_template(model_dir, config) or plain
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
            InvalidModel: the chat template cannot be used at all.
        """
        iterator = iter(rows)
        while batch := list(islice(iterator, BATCH_ROWS)):
            yield from self._render_batch(batch)

    def token_text(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def _render_batch(self, rows: list[SourceRow]) -> Iterator[RenderedRow | UnusableRow]:
        chats = [row.example for row in rows if isinstance(row.example, Chat)]
        rendered_chats = iter(self._templates.render(chats)) if chats else iter(())
        drafts = [self._draft(row, rendered_chats) for row in rows]
        encodings = self._tokenizer.encode_batch([draft.text for draft in drafts], add_special_tokens=False)
        for row, draft, encoding in zip(rows, drafts, encodings, strict=True):
            if draft.error is not None:
                yield _unusable(row, draft.error)
            else:
                yield self._finish(row, draft, encoding)

    def _draft(self, row: SourceRow, rendered_chats: Iterator[RenderedChat]) -> RenderedChat:
        """The row's text and its trained character spans."""
        example = row.example
        if isinstance(example, Chat):
            return next(rendered_chats)
        if isinstance(example, Completion):
            text = example.prompt + example.completion
            return RenderedChat(text, ((len(example.prompt), len(text)),))
        return RenderedChat(example.text, ((0, len(example.text)),))

    def _finish(self, row: SourceRow, draft: RenderedChat, encoding: Encoding) -> RenderedRow | UnusableRow:
        ids: list[int] = encoding.ids
        trained = self._trained_tokens(draft, encoding)
        is_chat = isinstance(row.example, Chat)
        if not is_chat and self._bos is not None and ids[:1] != [self._bos]:
            ids, trained = [self._bos, *ids], [False, *trained]
        ends_open = bool(ids) and trained[-1] and ids[-1] not in self._special_ids
        if self._eos is not None and ends_open:
            # Nothing ends the last answer: without a learned stop token the adapter would never stop.
            ids, trained = [*ids, self._eos], [*trained, True]
        if self._rules.train_on == "all":
            trained = [True] * len(ids)
        limit = self._rules.max_seq_len_tokens
        cut = max(0, len(ids) - limit)
        if cut and self._rules.too_long != "truncate":
            return _unusable(row, f"{len(ids)} tokens long; max_seq_len_tokens is {limit}", too_long=len(ids))
        result = RenderedRow(row.line, draft.text, tuple(ids[:limit]), tuple(trained[:limit]), cut)
        if result.trained_tokens == 0:
            after = f" after {cut} tokens were cut off" if cut else ""
            return _unusable(row, f"nothing to train: no token of an answer is left{after}")
        return result

    def _trained_tokens(self, draft: RenderedChat, encoding: Encoding) -> list[bool]:
        """Which tokens overlap a trained span; each span ends with its stop token, if it has one."""
        ids: list[int] = encoding.ids
        offsets: list[Span] = encoding.offsets
        trained = [False] * len(ids)
        for start, end in draft.spans:
            inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
            if not inside:
                continue
            first, last = inside[0], inside[-1]
            # Behind the stop token a template may put a line break that is never generated.
            stop = next((i for i in range(last, first - 1, -1) if ids[i] in self._special_ids), None)
            if stop is not None and draft.text[offsets[stop][1] : end].isspace():
                last = stop
            elif ids[last] not in self._special_ids and last + 1 < len(ids) and ids[last + 1] in self._stop_ids:
                last += 1
            trained[first : last + 1] = [True] * (last + 1 - first)
        return trained

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


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise InvalidModel(f"the base model's tokenizer.json cannot be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _chat_template(model_dir: Path, config: dict[str, Any]) -> str | None:
    """The model's template: chat_template.jinja, else the config's (the one named default, if there are several)."""
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _stop_ids(model_dir: Path, eos: int | None) -> set[int]:
    """Tokens that end generation: the tokenizer's, and those of generation_config.json."""
    listed = _read_json(model_dir / "generation_config.json").get("eos_token_id")
    ids = {listed} if isinstance(listed, int) else set(listed or ())
    return ids | ({eos} if eos is not None else set())
