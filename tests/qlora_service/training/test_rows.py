from __future__ import annotations

from pathlib import Path

from qlora_service.data.rendering import RenderedRow, UnusableRow
from qlora_service.errors import Finding
from qlora_service.training.rows import WRITE_ROWS, store_rendered


def test_rows_come_back_by_position_and_unusable_ones_are_counted(tmp_path: Path) -> None:
    def results() -> list[RenderedRow | UnusableRow]:
        made: list[RenderedRow | UnusableRow] = []
        for line in range(2 * WRITE_ROWS + 7):
            if line % 10 == 3:
                made.append(UnusableRow(Finding("too long", line=line), too_long=99))
            else:
                made.append(RenderedRow(line, "text", (line, 1, 2), (False, True, False)))
        return made

    rows, report = store_rendered(results(), tmp_path / "rows.arrow")
    assert len(rows) == report.usable_rows == 1806
    assert report.too_long_rows == 201
    assert rows[3].line == 4
    assert rows[1805].input_ids == [2006, 1, 2]
    assert rows[1805].trained == [False, True, False]


def test_no_usable_row_gives_an_empty_table(tmp_path: Path) -> None:
    rows, report = store_rendered([UnusableRow(Finding("nothing to train"))], tmp_path / "rows.arrow")
    assert len(rows) == 0
    assert report.finding_count == 1
