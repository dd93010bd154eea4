"""Warnings about rows, collected by kind."""

from __future__ import annotations

from qlora_service.domain.row_warnings import (
    MAX_KINDS,
    OTHER,
    RowWarning,
    RowWarnings,
    first_of_each_kind,
    warning_texts,
)
from qlora_service.errors import Finding


def collected(*rows: list[Finding]) -> list[RowWarning]:
    warnings = RowWarnings()
    for row in rows:
        warnings.add(row)
    return warnings.kinds


def test_rows_of_one_kind_are_counted_with_their_first_lines_and_the_first_pointer() -> None:
    rows = [[Finding("not trained", f"/messages/{line}", line)] for line in range(3, 15)]
    assert collected(*rows) == [RowWarning("not trained", "/messages/3", 12, [3, 4, 5, 6, 7])]


def test_reasons_that_differ_in_numbers_are_of_one_kind() -> None:
    (kind,) = collected([Finding("204 tokens long", line=1)], [Finding("99 tokens long", line=2)])
    assert (kind.reason, kind.rows) == ("204 tokens long", 2)


def test_row_with_a_warning_twice_is_counted_once() -> None:
    (kind,) = collected([Finding("odd key", "/a", 1), Finding("odd key", "/b", 1)])
    assert (kind.pointer, kind.rows, kind.lines) == ("/a", 1, [1])


def test_kinds_are_ordered_by_their_rows() -> None:
    rare, frequent = Finding("rare", line=1), Finding("frequent", line=2)
    assert [kind.reason for kind in collected([rare], [frequent], [frequent])] == ["frequent", "rare"]


def test_rows_of_too_many_kinds_are_counted_together() -> None:
    kinds = [Finding(f"key {'x' * number}", line=number + 1) for number in range(MAX_KINDS)]
    more = [[Finding(f"other {'y' * number}", "/z", 100 + number), Finding("last", line=1)] for number in range(3)]
    *listed, other = collected(*([kind] for kind in kinds), *more, [kinds[0]])
    assert len(listed) == MAX_KINDS
    assert (listed[0].reason, listed[0].rows) == (kinds[0].reason, 2)
    assert other == RowWarning(OTHER, "", 3, [100, 101, 102])


def test_text_has_count_lines_place_and_reason() -> None:
    assert str(RowWarning("odd", "", 1, [4])) == "1 row (line 4): odd"
    assert str(RowWarning("odd", "/a", 3, [4, 5, 9])) == "3 rows (line 4, 5, 9 at /a): odd"
    assert str(RowWarning("odd", "", 6, [1, 2, 3, 4, 5])) == "6 rows (line 1, 2, 3, 4, 5, …): odd"


def test_kind_in_two_groups_is_that_of_the_first() -> None:
    all_rows, some_rows = RowWarning("cut to 9", "", 7, [1]), RowWarning("cut to 8", "", 2, [1])
    other = RowWarning("odd", "", 1, [3])
    assert first_of_each_kind([all_rows], [some_rows, other]) == [all_rows, other]


def test_texts_name_the_rows_that_are_left_out_first() -> None:
    kind = RowWarning("odd", "", 1, [3])
    assert warning_texts([kind], [kind]) == ["left out: 1 row (line 3): odd", "1 row (line 3): odd"]
