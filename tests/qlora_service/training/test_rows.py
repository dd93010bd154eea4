"""Rendered rows in their Arrow file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qlora_service.data.rendering.renderer import RenderedRow, UnusableRow
from qlora_service.errors import Finding
from qlora_service.training.network.micro_batch import LabeledRow, PreferencePair, TokenRow
from qlora_service.training.rows import BATCH_ROWS, RenderedRows, store_rendered


def row(line: int, *ids: int) -> RenderedRow:
    return RenderedRow(line, "text", ids, tuple(position > 0 for position in range(len(ids))))


def test_rows_are_read_by_position_and_unusable_ones_are_counted(tmp_path: Path) -> None:
    def results() -> list[RenderedRow | UnusableRow]:
        result: list[RenderedRow | UnusableRow] = []
        for line in range(2 * BATCH_ROWS + 7):
            if line % 10 == 3:
                result.append(UnusableRow(Finding("too long", line=line), too_long=99))
            else:
                result.append(RenderedRow(line, "text", (line, 1, 2), (False, True, False)))
        return result

    rows, report = store_rendered(results(), tmp_path / "rows.arrow")
    assert len(rows) == report.usable_rows == 1806
    assert report.too_long_rows == 201
    assert rows[3].line == 4
    assert rows[1805] == TokenRow(2006, [2006, 1, 2], [False, True, False])
    assert [rows[position].line for position in (999, 1000, 1001)] == [1110, 1111, 1112]


def test_pairs_and_labelled_answers_are_read_as_written(tmp_path: Path) -> None:
    results = [
        replace(row(1, 5, 6, 7), rejected=row(1, 5, 8)),
        replace(row(2, 5, 9), desirable=False),
        replace(row(3, 5, 9), desirable=True),
        row(4, 7, 7),
    ]
    rows, report = store_rendered(results, tmp_path / "rows.arrow")
    chosen, rejected = TokenRow(1, [5, 6, 7], [False, True, True]), TokenRow(1, [5, 8], [False, True])
    assert [rows[position] for position in range(4)] == [
        PreferencePair(chosen, rejected),
        LabeledRow(TokenRow(2, [5, 9], [False, True]), desirable=False),
        LabeledRow(TokenRow(3, [5, 9], [False, True]), desirable=True),
        TokenRow(4, [7, 7], [False, True]),
    ]
    assert report.tokens == 11


def test_rows_are_read_from_an_existing_file(tmp_path: Path) -> None:
    store_rendered([row(1, 5, 6), row(2, 7, 8)], tmp_path / "rows.arrow")
    rows = RenderedRows(tmp_path / "rows.arrow")
    assert [rows[position].line for position in range(len(rows))] == [1, 2]


@pytest.mark.parametrize("position", [-1, 1])
def test_a_position_outside_is_an_index_error(tmp_path: Path, position: int) -> None:
    rows, _ = store_rendered([row(1, 5, 6)], tmp_path / "rows.arrow")
    with pytest.raises(IndexError, match="of 1"):
        rows[position]


def test_no_usable_row_gives_an_empty_table(tmp_path: Path) -> None:
    rows, report = store_rendered([UnusableRow(Finding("nothing to train"))], tmp_path / "rows.arrow")
    assert len(rows) == 0
    assert report.finding_count == 1
