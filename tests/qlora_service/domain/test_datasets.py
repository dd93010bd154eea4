from __future__ import annotations

import json
from typing import Any

from qlora_service.domain.datasets import DatasetReport
from qlora_service.domain.row_warnings import RowWarning
from qlora_service.errors import Finding

FINDINGS = (Finding("bad", "/a", 2, 17), Finding("bad", "/a", 3, 30))
REPORT = DatasetReport(
    "jsonl",
    "text",
    bytes=99,
    rows=5,
    usable_rows=3,
    finding_count=2,
    findings=FINDINGS,
    finding_kinds=(RowWarning("bad", "/a", 2, [2, 3]),),
    warnings=(RowWarning("odd", "/b", 1, [4]),),
)


def through_json(value: dict[str, Any]) -> DatasetReport:
    return DatasetReport.from_dict(json.loads(json.dumps(value)))


def test_report_survives_json() -> None:
    assert through_json(REPORT.as_dict()) == REPORT


def test_report_of_an_earlier_version_has_the_kinds_of_its_findings() -> None:
    stored = REPORT.as_dict()
    del stored["finding_kinds"], stored["warnings"]
    report = through_json(stored)
    assert (report.finding_kinds, report.warnings) == (REPORT.finding_kinds, ())
