"""Rendered rows for a reader: the text, what is trained of it, and the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from qlora_service.data.rendering.chat_template import Span
from qlora_service.data.rendering.renderer import RenderedRow, Renderer, UnusableRow


def preview_row(renderer: Renderer, result: RenderedRow | UnusableRow) -> dict[str, Any]:
    """The fields of `api.schemas.PreviewRow`, or those of `PreviewProblem`."""
    if isinstance(result, UnusableRow):
        return {"line": result.finding.line, "problem": result.finding.reason}
    rejected = None if result.rejected is None else _document(renderer, result.rejected)
    return {"line": result.line, **_document(renderer, result), "rejected": rejected, "desirable": result.desirable}


def trained_spans(spans: Sequence[Span | None], trained: Sequence[bool]) -> list[Span]:
    """The characters of each run of trained tokens, in ascending order; spans that touch or overlap are one."""
    merged: list[Span] = []
    previous_trained = False
    for span, is_trained in zip(spans, trained, strict=True):
        if is_trained and span is not None:
            start, end = span
            if merged and (previous_trained or start <= merged[-1][1]):
                start, end = min(start, merged[-1][0]), max(end, merged[-1][1])
                merged.pop()
            merged.append((start, end))
        previous_trained = is_trained
    return [(start, end) for start, end in merged if start < end]


def _document(renderer: Renderer, document: RenderedRow) -> dict[str, Any]:
    spans = renderer.token_spans(document)
    text, is_cut = document.text, document.cut_tokens > 0
    if is_cut:
        text = text[: max((span[1] for span in spans if span is not None), default=0)]
    texts = [
        # A normalizer or a decoder changes text (NFC, the first space): what the token stands for in the row is shown.
        text[span[0] : span[1]] if span is not None and is_alone else renderer.token_text(token_id)
        for token_id, span, is_alone in zip(document.input_ids, spans, _alone(spans, is_cut), strict=True)
    ]
    tokens = [
        {"id": token_id, "text": token, "trained": is_trained}
        for token_id, token, is_trained in zip(document.input_ids, texts, document.trained, strict=True)
    ]
    has_stop = len(spans) > 1 and spans[-1] is None
    return {
        "text": text,
        "trained_spans": trained_spans(spans, document.trained),
        "appended_stop": texts[-1] if has_stop else None,
        "tokens": tokens,
        "cut_tokens": document.cut_tokens,
    }


def _alone(spans: Sequence[Span | None], is_cut: bool) -> list[bool]:
    """For each token, whether it has characters and shares none of them with the next or the previous token.

    `is_cut`: tokens follow that have been cut off, and may share the last one's characters.
    """
    known = [span or (0, 0) for span in spans]
    overlaps = [start < previous_end for (_, previous_end), (start, _) in pairwise(known)]
    shared = zip([False, *overlaps], [*overlaps, is_cut], strict=True)
    return [start < end and not (before or after) for (start, end), (before, after) in zip(known, shared, strict=True)]
