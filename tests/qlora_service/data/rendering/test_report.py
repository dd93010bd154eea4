"""The report on rendered rows: counts, rows left out, warnings."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from qlora_service.data.rendering.renderer import RenderedRow, Renderer, RenderRules, UnusableRow
from qlora_service.data.rendering.report import RenderReport, render_report, row_warnings
from qlora_service.data.rows.examples import Completion, Example, LabeledAnswer, Preference, SourceRow, Text
from qlora_service.domain.datasets import DatasetReport
from qlora_service.domain.row_warnings import RowWarning
from qlora_service.errors import Finding
from tests.rendered_rows import NOW

NOT_TRAINED = "`train` is false: the message is not trained"


def row(line: int, *warnings: Finding, cut_tokens: int = 0) -> RenderedRow:
    return RenderedRow(line, "text", (5, 6, 7), (False, True, True), cut_tokens, warnings=warnings)


def report_on(*results: RenderedRow | UnusableRow) -> RenderReport:
    report = RenderReport()
    for result in results:
        report.add(result)
    report.finish()
    return report


def test_twelve_rows_of_one_kind_are_one_warning() -> None:
    report = report_on(*(row(line, Finding(NOT_TRAINED, "/messages/1/train", line)) for line in range(1, 13)))
    assert report.warnings == [
        {"reason": NOT_TRAINED, "pointer": "/messages/1/train", "rows": 12, "lines": [1, 2, 3, 4, 5]}
    ]
    assert (report.usable_rows, report.finding_kinds) == (12, [])


def test_truncated_rows_are_a_warning() -> None:
    pair = replace(row(2), rejected=row(2, cut_tokens=9))
    report = report_on(row(1, cut_tokens=4), pair, row(3))
    assert report.cut_rows == 2
    assert report.warnings == [{"reason": "truncated to 3 tokens", "pointer": "", "rows": 2, "lines": [1, 2]}]


def test_unusable_rows_are_counted_by_reason_beyond_the_first_findings() -> None:
    long = [UnusableRow(Finding(f"{line} tokens long", line=line), too_long=line) for line in range(100, 250)]
    report = report_on(*long, UnusableRow(Finding("nothing to train", line=250)))
    assert (report.finding_count, len(report.findings)) == (151, 100)
    assert [(kind["reason"], kind["rows"]) for kind in report.finding_kinds] == [
        ("100 tokens long", 150),
        ("nothing to train", 1),
    ]


def test_report_survives_json_and_one_of_an_earlier_version_can_be_read() -> None:
    report = report_on(row(1, Finding("odd", line=1)), UnusableRow(Finding("bad", line=2)))
    stored = json.loads(json.dumps(asdict(report)))
    assert RenderReport(**stored) == report
    del stored["finding_kinds"], stored["warnings"]
    assert RenderReport(**stored).warnings == []


@pytest.mark.parametrize(
    "example",
    [
        Text("some text"),
        LabeledAnswer(Completion("a ", "b"), desirable=True),
        Preference(Completion("a ", "b"), Completion("a ", "c")),
    ],
)
def test_warnings_of_reading_are_those_of_the_rendered_row(tiny_model: Path, example: Example) -> None:
    warning = Finding(NOT_TRAINED, "/train", 7)
    with Renderer(tiny_model, RenderRules(64), NOW) as renderer:
        report = render_report(renderer, [SourceRow(example, 7, None, warnings=(warning,))], max_rows=9)
    assert report.warnings == [{"reason": NOT_TRAINED, "pointer": "/train", "rows": 1, "lines": [7]}]


def test_users_are_told_each_kind_once_with_the_count_of_all_rows() -> None:
    read = DatasetReport(
        "jsonl",
        "text",
        bytes=99,
        rows=90,
        usable_rows=89,
        finding_count=1,
        findings=(),
        finding_kinds=(RowWarning("not JSON", "", 1, [1]),),
        warnings=(RowWarning(NOT_TRAINED, "/train", 80, [2, 3, 4, 5, 6]),),
    )
    rendered = report_on(row(2, Finding(NOT_TRAINED, "/train", 2), Finding("no tool is rendered", "/tools", 2)))
    assert row_warnings(read, rendered, "validation dataset: ") == [
        "validation dataset: left out: 1 row (line 1): not JSON",
        f"validation dataset: 80 rows (line 2, 3, 4, 5, 6, … at /train): {NOT_TRAINED}",
        "validation dataset: 1 row (line 2 at /tools): no tool is rendered",
    ]
