"""The printed result of `datasets check`: findings by line, then findings and warnings by kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_service.cli.dataset_check import CheckResult, print_result, result_as_dict
from qlora_service.data.rendering.report import RenderReport
from qlora_service.domain.datasets import DatasetReport
from qlora_service.domain.row_warnings import RowWarning
from qlora_service.models.catalog.catalog import Catalog
from tests.running_api import write_rows

READ = RowWarning("`train` is false", "/messages/1/train", 12, [1, 2, 3, 4, 5])
RENDERED = RowWarning("the template renders no tool", "/tools", 1, [7])


def result(lengths: RenderReport | None = None) -> CheckResult:
    """A check without findings, with a warning from reading."""
    report = DatasetReport(
        "jsonl", "messages", bytes=9, rows=12, usable_rows=12, finding_count=0, findings=(), warnings=(READ,)
    )
    return CheckResult([], 0, report, lengths)


def test_each_kind_of_warning_is_a_line_with_the_first_place(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = RenderReport(rows=12, usable_rows=12, warnings=[READ.as_dict() | {"rows": 3}, RENDERED.as_dict()])
    print_result(Path("a.jsonl"), result(lengths))
    assert capsys.readouterr().out.splitlines() == [
        "a.jsonl:1: /messages/1/train: warning: `train` is false (12 rows: line 1, 2, 3, 4, 5, …)",
        "a.jsonl:7: /tools: warning: the template renders no tool (1 row)",
    ]
    print_result(Path("a.jsonl"), result())
    assert capsys.readouterr().out.count("warning: ") == 1


def test_json_has_the_warnings_of_reading_and_of_rendering() -> None:
    value = result_as_dict(Path("a.jsonl"), result(RenderReport(warnings=[RENDERED.as_dict()])))
    assert value["warnings"] == [READ.as_dict()]
    assert value["lengths"]["warnings"] == [RENDERED.as_dict()]


def test_reasons_of_findings_that_are_not_printed_are_counted(run: Any, tiny_model: Path, tmp_path: Path) -> None:
    Catalog(tmp_path / "data" / "models").import_model("tiny", tiny_model)
    rows = [{"prompt": "word " * 100, "completion": "b"}] * 120 + [{"prompt": "a", "completion": "b"}, {"prompt": 1}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    model = ("--base-model", "tiny", "--data-dir", tmp_path / "data", "--max-seq-len-tokens", 64)
    outcome = run("datasets", "check", path, *model)
    assert (outcome.code, outcome.stdout.count(f"{path}:")) == (1, 101)
    note, unread, too_long, _summary = outcome.stderr.splitlines()
    assert note == "… and 20 more findings: correct these, and check again. All of them by reason:"
    assert unread.startswith("  1 row (line 122): the keys of this row fit no shape.")
    assert too_long.startswith("  120 rows (line 1, 2, 3, 4, 5, …): ")
    assert too_long.endswith(" tokens long; max_seq_len_tokens is 64")
