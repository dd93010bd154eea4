"""Losses of training rows: their file, their state, and their memory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from qlora_service.training.evaluation.row_losses import RowLosses


def written_records(losses: RowLosses, directory: Path) -> list[dict[str, Any]]:
    path = directory / "rows.jsonl"
    losses.write(path)
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_written_worst_first_with_their_first_and_last_loss(tmp_path: Path) -> None:
    losses = RowLosses()
    losses.record(1, [3, 70], [2.5, 9.0])
    losses.record(2, [1], [1.5])
    losses.record(4, [70, 3], [0.5, 2.25])
    assert written_records(losses, tmp_path) == [
        {"line": 3, "first_loss": 2.5, "first_step": 1, "last_loss": 2.25, "last_step": 4, "times_seen": 2},
        {"line": 1, "first_loss": 1.5, "first_step": 2, "last_loss": 1.5, "last_step": 2, "times_seen": 1},
        {"line": 70, "first_loss": 9.0, "first_step": 1, "last_loss": 0.5, "last_step": 4, "times_seen": 2},
    ]


def test_losses_that_are_not_finite_are_null_and_come_first(tmp_path: Path) -> None:
    losses = RowLosses()
    losses.record(1, [1, 2, 3, 4, 5], [1.0, math.nan, 8.0, math.inf, -math.inf])
    losses.record(2, [3], [math.nan])
    records = written_records(losses, tmp_path)
    assert [record["line"] for record in records] == [2, 3, 4, 5, 1]
    assert [record["last_loss"] for record in records] == [None, None, None, None, 1.0]
    assert records[1]["first_loss"] == 8.0


def test_equal_losses_are_in_the_order_of_the_lines(tmp_path: Path) -> None:
    losses = RowLosses()
    losses.record(1, [9, 2, 400], [1.0, 1.0, 1.0])
    assert [record["line"] for record in written_records(losses, tmp_path)] == [2, 9, 400]


def test_a_row_seen_twice_in_a_step_counts_twice(tmp_path: Path) -> None:
    losses = RowLosses()
    losses.record(1, [2, 2], [3.0, 1.0])
    (record,) = written_records(losses, tmp_path)
    assert (record["first_loss"], record["last_loss"], record["times_seen"]) == (3.0, 1.0, 2)


def test_an_empty_record_writes_an_empty_file(tmp_path: Path) -> None:
    assert written_records(RowLosses(), tmp_path) == []


@pytest.mark.parametrize("as_lists", [False, True])
def test_a_restored_state_continues_like_an_uninterrupted_one(as_lists: bool, tmp_path: Path) -> None:
    losses, resumed = RowLosses(), RowLosses()
    losses.record(1, [5, 1000], [0.1, math.nan])
    state: dict[str, Any] = losses.state()
    if as_lists:
        state = json.loads(json.dumps({name: column.tolist() for name, column in state.items()}))
    resumed.record(7, [12], [1.0])  # replaced by the restored state
    resumed.restore(state)
    for each in (losses, resumed):
        each.record(2, [5, 6], [0.7, 0.3])
    assert written_records(resumed, tmp_path) == written_records(losses, tmp_path)


def test_scattered_lines_of_a_long_file_take_little_memory() -> None:
    losses = RowLosses()
    lines = list(range(1, 50_000_000, 500_000))
    losses.record(1, lines, [1.0] * len(lines))
    assert losses.state()["line"].tolist() == lines
    assert sum(page.nbytes for page in losses._pages.values()) < 300_000


def test_lines_and_losses_of_different_lengths_are_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        RowLosses().record(1, [1, 2], [1.0])
