"""Rows that the service renders, compared with their references: ids, masks, and reasons for differences."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from itertools import groupby

from qlora_service.data.json.strict import RowProblem
from qlora_service.data.rendering.renderer import RenderedRow, Renderer, RenderRules, UnusableRow
from qlora_service.data.rows.examples import SourceRow
from qlora_service.data.rows.shapes import to_example
from tests.benchmarks._rendering.conversations import Message, Row
from tests.benchmarks._rendering.reference import Family, Marks, NotRendered, Reference, Span

MAX_TOKENS = 16_384


class Outcome(StrEnum):
    NOT_RENDERED = "not rendered by transformers"
    REFUSED = "refused"
    REFUSAL_EXPLAINED = "refusal explained"
    OTHER_IDS = "other ids"
    OTHER_IDS_EXPLAINED = "other ids explained"
    NO_MARKS = "no marks"
    EQUAL = "equal"
    EXPLAINED = "explained"
    UNEXPLAINED = "unexplained"


@dataclass(frozen=True)
class Comparison:
    """The outcome of one row. `reasons`: names of the reasons that explain it; `detail`: the two texts, or an error."""

    family: str
    kind: str
    outcome: Outcome
    reasons: tuple[str, ...] = ()
    detail: str = ""
    copy_agrees: bool | None = None
    """Whether the family's marked copy has TRL's marks; None where not both render the text"""


@dataclass(frozen=True)
class Difference:
    """Consecutive tokens on whose training the service and the marks disagree. `trained`: by the service."""

    tokens: tuple[Span, ...]
    trained: bool
    text: str
    marks: Marks
    family: Family

    @property
    def span(self) -> Span:
        return self.tokens[0][0], self.tokens[-1][1]

    def is_in(self, spans: Iterable[Span]) -> bool:
        """Whether one of the spans holds all of it."""
        return any(start <= self.span[0] and self.span[1] <= end for start, end in spans)


# A difference has the first reason that applies.
REASONS: dict[str, Callable[[Difference], bool]] = {
    "the generation prompt writes it": lambda it: not it.trained and it.is_in(p.span for p in it.marks.prompts),
    "the generation prompt with the row's arguments writes it": lambda it: (
        not it.trained and it.is_in(p.span for p in it.marks.row_prompts)
    ),
    "the generation prompt would go on otherwise": lambda it: (
        it.trained and it.is_in(p.span for p in it.marks.prompts if not p.whole)
    ),
    "the token ends generation, and the template writes it after the turn": lambda it: (
        it.trained and it.is_in(it.marks.stops)
    ),
    "a second end token after the last turn's own": lambda it: (
        not it.trained
        and it.text[it.span[0] :].strip() in it.family.stops
        and it.text[: it.span[0]].rstrip().endswith(it.family.stops)
    ),
    "the template renders nothing of the answer, whose end alone would teach to answer nothing": lambda it: (
        not it.trained and it.is_in(span for span in it.marks.spans if not _words(it.text[slice(*span)]))
    ),
    "a token across the edge of the turn": lambda it: all(_straddles(token, it.marks.spans) for token in it.tokens),
}
NOTHING_PRINTED = "the template prints nothing of the answers"
BRACES = "the arguments as an object, where the template writes braces around their text"


def compare(family: Family, kinds: dict[str, Row]) -> Iterator[Comparison]:
    """The comparison of a row of each kind."""
    rows = {kind: family.as_sent(row) for kind, row in kinds.items()}
    references: dict[str, Reference] = {}
    for kind, row in rows.items():
        try:
            references[kind] = family.reference(row)
        except NotRendered as error:
            yield Comparison(family.name, kind, Outcome.NOT_RENDERED, detail=str(error))
    for kind, result in _rendered(family, {kind: rows[kind] for kind in references}).items():
        comparison = _compared(family, kind, rows[kind], references[kind], result)
        yield replace(comparison, copy_agrees=references[kind].copy_agrees)


def marked(text: str, spans: Sequence[Span], first: int = 0) -> str:
    """The text from shortly before the character `first`, with ⟦ ⟧ around the spans."""
    for start, end in sorted(spans, reverse=True):
        text = f"{text[:start]}⟦{text[start:end]}⟧{text[end:]}"
    return text[max(0, first - 30) :]


def _rendered(family: Family, rows: dict[str, Row]) -> dict[str, RenderedRow | str]:
    """What the service renders of each row, or its reason for a refusal."""
    results: dict[str, RenderedRow | str] = {}
    examples = []
    for line, (kind, row) in enumerate(rows.items(), start=1):
        try:
            examples.append((kind, SourceRow(to_example(row, "messages"), line, None)))
        except RowProblem as problem:
            results[kind] = str(problem)
    with Renderer(family.model_dir, RenderRules(MAX_TOKENS), datetime.now()) as renderer:
        rendered = renderer.render(source for _, source in examples)
        for (kind, _), result in zip(examples, rendered, strict=True):
            results[kind] = result.finding.reason if isinstance(result, UnusableRow) else result
    return results


def _compared(family: Family, kind: str, row: Row, reference: Reference, result: RenderedRow | str) -> Comparison:
    if isinstance(result, str):
        if not any(words in reference.text for words in _answers(row["messages"])):
            return Comparison(family.name, kind, Outcome.REFUSAL_EXPLAINED, (NOTHING_PRINTED,), result)
        return Comparison(family.name, kind, Outcome.REFUSED, detail=f"{result}\nmarks   {_reference_marks(reference)}")
    if result.input_ids != reference.ids:
        if result.input_ids == reference.other_ids:
            return Comparison(family.name, kind, Outcome.OTHER_IDS_EXPLAINED, (BRACES,))
        return Comparison(family.name, kind, Outcome.OTHER_IDS, detail=_other_text(reference, result))
    marks = reference.trl or reference.own
    if marks is None:
        return Comparison(family.name, kind, Outcome.NO_MARKS)
    wanted = marks.spans if reference.trl else marks.generated
    differences = list(_differences(family, reference, marks, wanted, result.trained))
    reasons = [_reason(difference) for difference in differences]
    if not differences:
        return Comparison(family.name, kind, Outcome.EQUAL)
    if None not in reasons:
        named = tuple(dict.fromkeys(reason for reason in reasons if reason is not None))
        return Comparison(family.name, kind, Outcome.EXPLAINED, named)
    ours = _spans(reference.offsets, result.trained)
    unlike = [difference.span for difference, reason in zip(differences, reasons, strict=True) if reason is None]
    start = min(span[0] for span in [*wanted, *ours, *unlike])
    detail = f"marks   {marked(reference.text, wanted, start)}\nservice {marked(reference.text, ours, start)}"
    return Comparison(family.name, kind, Outcome.UNEXPLAINED, detail=detail)


def _differences(
    family: Family, reference: Reference, marks: Marks, wanted: Sequence[Span], trained: Sequence[bool]
) -> Iterator[Difference]:
    expected = [any(start < last and first < end for first, last in wanted) for start, end in reference.offsets]
    sides = [None if ours == theirs else ours for ours, theirs in zip(trained, expected, strict=True)]
    for side, group in groupby(range(len(sides)), key=sides.__getitem__):
        if side is not None:
            tokens = tuple(reference.offsets[token] for token in group)
            yield Difference(tokens, side, reference.text, marks, family)


def _reason(difference: Difference) -> str | None:
    return next((name for name, applies in REASONS.items() if applies(difference)), None)


def _spans(offsets: Sequence[Span], trained: Sequence[bool]) -> list[Span]:
    spans = []
    for is_trained, group in groupby(range(len(offsets)), key=trained.__getitem__):
        if is_trained:
            tokens = list(group)
            spans.append((offsets[tokens[0]][0], offsets[tokens[-1]][1]))
    return spans


def _other_text(reference: Reference, result: RenderedRow) -> str:
    """The two texts from shortly before their first difference."""
    if result.text == reference.text:
        more = len(result.input_ids) - len(reference.ids)
        return f"the same text, {more:+} tokens; it ends with {reference.text[-40:]!r}"
    pairs = zip(reference.text, result.text, strict=False)
    same = next((place for place, (left, right) in enumerate(pairs) if left != right), None)
    start = max(0, (min(len(reference.text), len(result.text)) if same is None else same) - 60)
    return f"transformers …{reference.text[start : start + 300]}\nservice      …{result.text[start : start + 300]}"


def _reference_marks(reference: Reference) -> str:
    marks = reference.trl or reference.own
    if marks is None or not marks.spans:
        return reference.text
    return marked(reference.text, marks.spans, marks.spans[0][0])


def _answers(messages: Sequence[Message]) -> list[str]:
    """Words of the trained answers, and the names of the functions that they call."""
    answers = [message for message in messages if message["role"] == "assistant" and message.get("weight") != 0]
    contents = [message.get("content") for message in answers]
    texts = [content if isinstance(content, str) else content[0]["text"] for content in contents if content]
    calls = [call["function"]["name"] for message in answers for call in message.get("tool_calls") or ()]
    return [text.strip() for text in texts] + calls


def _words(text: str) -> str:
    """The text without tags."""
    return re.sub(r"<[^<>]+>", "", text).strip()


def _straddles(token: Span, spans: Iterable[Span]) -> bool:
    return any(token[0] < place < token[1] for span in spans for place in span)
