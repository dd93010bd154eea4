"""The report on rendering a dataset's rows, and what it says to users."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from qlora_service.data.files.checks import MAX_FINDINGS
from qlora_service.data.rendering.renderer import RenderedRow, Renderer, UnusableRow
from qlora_service.data.rows.examples import SourceRow
from qlora_service.domain.datasets import DatasetReport
from qlora_service.domain.row_warnings import RowWarning, RowWarnings, first_of_each_kind, warning_texts
from qlora_service.errors import Finding

VALIDATION_PREFIX = "validation dataset: "
"""Begins the `row_warnings` of a job's validation dataset."""


@dataclass
class RenderReport:
    """Result of rendering a dataset: counts, a histogram of lengths, findings for the unusable rows, and warnings.

    The tokens of a preference pair are the tokens of both sides; its length is the length of the longer side.
    """

    rows: int = 0
    usable_rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest_tokens: int = 0
    cut_rows: int = 0
    """Usable rows that were truncated."""
    plain_prompts: int = 0
    """Usable rows whose prompt and answer are plain text, without a template."""
    too_long_rows: int = 0
    unknown_token_rows: int = 0
    """Rows with a token that the base has no embedding for."""
    complete: bool = True
    """False when only the first rows were rendered."""
    histogram: dict[str, int] = field(default_factory=dict)
    """Rows by length: key "128" counts rows of 65 to 128 tokens."""
    finding_count: int = 0
    findings: list[dict[str, Any]] = field(default_factory=list)
    finding_kinds: list[dict[str, Any]] = field(default_factory=list)
    """The findings of all unusable rows as `RowWarning`s; `finish` sets them"""
    warnings: list[dict[str, Any]] = field(default_factory=list)
    """`RowWarning`s of the usable rows; `finish` sets them"""

    def __post_init__(self) -> None:
        self._finding_kinds, self._warnings = RowWarnings(), RowWarnings()

    def add(self, result: RenderedRow | UnusableRow) -> None:
        self.rows += 1
        if isinstance(result, UnusableRow):
            self.finding_count += 1
            self._finding_kinds.add([result.finding])
            if len(self.findings) < MAX_FINDINGS:
                self.findings.append(result.finding.as_dict())
            self.unknown_token_rows += result.unknown_token
            if result.too_long is not None:
                self.too_long_rows += 1
                self._count_length(result.too_long)
            return
        sides = [side for side in (result, result.rejected) if side is not None]
        self.usable_rows += 1
        self.plain_prompts += result.has_plain_prompt
        self.tokens += sum(len(side.input_ids) for side in sides)
        self.trained_tokens += sum(side.trained_tokens for side in sides)
        self._count_length(max(len(side.input_ids) + side.cut_tokens for side in sides))
        warnings = result.warnings
        if cut := [len(side.input_ids) for side in sides if side.cut_tokens]:
            self.cut_rows += 1
            warnings = (*warnings, Finding(f"truncated to {cut[0]} tokens", line=result.line))
        self._warnings.add(warnings)

    def finish(self) -> None:
        """Sums up what was added, after the last row."""
        self.histogram = dict(sorted(self.histogram.items(), key=lambda item: int(item[0])))
        self.finding_kinds = [kind.as_dict() for kind in self._finding_kinds.kinds]
        self.warnings = [kind.as_dict() for kind in self._warnings.kinds]

    def _count_length(self, tokens: int) -> None:
        self.longest_tokens = max(self.longest_tokens, tokens)
        bucket = str(1 << max(3, (tokens - 1).bit_length()))
        self.histogram[bucket] = self.histogram.get(bucket, 0) + 1


def render_report(renderer: Renderer, rows: Iterable[SourceRow], max_rows: int) -> RenderReport:
    """The report on the first `max_rows` rows."""
    report = RenderReport()
    iterator = iter(rows)
    for result in renderer.render(islice(iterator, max_rows)):
        report.add(result)
    report.complete = next(iterator, None) is None
    report.finish()
    return report


def row_warnings(dataset: DatasetReport, rendered: RenderReport, prefix: str = "") -> list[str]:
    """What users should know of a dataset's rows: a text per kind of row left out, and per kind of warning."""
    left_out = [*dataset.finding_kinds, *(RowWarning(**kind) for kind in rendered.finding_kinds)]
    # The rendered rows may be the first ones only; the dataset's report is on all.
    warnings = first_of_each_kind(dataset.warnings, (RowWarning(**warning) for warning in rendered.warnings))
    return [prefix + text for text in warning_texts(left_out, warnings)]
