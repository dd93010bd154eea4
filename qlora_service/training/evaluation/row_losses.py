"""First and last loss of every training row, so that a user finds the rows that the model cannot learn."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlora_service.domain.metrics import finite_or_null

PAGE_LINES = 64
"""Lines per page. A page of 28 bytes a line is allocated with the first loss of one of its lines, so memory stays small
both for a million consecutive rows and for a few rows scattered over a long file."""
RECORD = np.dtype(
    [
        ("first_loss", np.float64),
        ("last_loss", np.float64),
        ("first_step", np.int32),
        ("last_step", np.int32),
        ("times_seen", np.int32),
    ]
)
RowLossesState = dict[str, "np.ndarray[Any, Any]"]
"""Arrays of equal length: "line", and the fields of `RECORD`"""


class RowLosses:
    """Losses by line of the uploaded dataset."""

    def __init__(self) -> None:
        self._pages = _empty_pages()

    def record(self, step: int, lines: Sequence[int], losses: Sequence[float]) -> None:
        """Records the loss in step `step` of each of the rows at `lines` (counted from 1)."""
        for line, loss in zip(lines, losses, strict=True):
            page, offset = divmod(line, PAGE_LINES)
            record = self._pages[page][offset]
            if record["times_seen"] == 0:
                record["first_loss"], record["first_step"] = loss, step
            record["last_loss"], record["last_step"] = loss, step
            record["times_seen"] += 1

    def write(self, path: Path) -> None:
        """Writes one JSON object per line, one for each row with a recorded loss, the highest last loss first.

        A loss that is not finite is written as null; rows whose last loss is not finite come first.
        """
        state = self.state()
        last, lines = state["last_loss"], state["line"]
        worst_first = np.lexsort((lines, -np.where(np.isfinite(last), last, np.inf)))
        with path.open("w", encoding="utf-8") as file:
            for record in _records(state, worst_first):
                file.write(json.dumps(record) + "\n")

    def state(self) -> RowLossesState:
        """The recorded rows, in the order of their lines."""
        numbers = sorted(self._pages)
        table = np.concatenate([np.zeros(0, RECORD), *(self._pages[number] for number in numbers)])
        starts = np.array(numbers, np.int64)[:, None] * PAGE_LINES
        lines = (starts + np.arange(PAGE_LINES)).ravel()
        is_recorded = table["times_seen"] > 0
        return {"line": lines[is_recorded]} | {name: table[name][is_recorded] for name in RECORD.names or ()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Replaces all losses by those of `state`, given as arrays or as lists."""
        pages, offsets = np.divmod(np.asarray(state["line"], np.int64), PAGE_LINES)
        table = np.zeros(len(pages), RECORD)
        for name in RECORD.names or ():
            table[name] = state[name]
        self._pages = _empty_pages()
        # Lines ascend, so the rows of a page are adjacent.
        starts = np.flatnonzero(np.diff(pages, prepend=-1))
        for first, last in zip(starts, np.append(starts, len(pages))[1:], strict=True):
            self._pages[int(pages[first])][offsets[first:last]] = table[first:last]


def _empty_pages() -> defaultdict[int, np.ndarray[Any, Any]]:
    return defaultdict(lambda: np.zeros(PAGE_LINES, RECORD))


def _records(state: RowLossesState, order: np.ndarray[Any, Any]) -> Iterator[dict[str, Any]]:
    names = ("line", "first_loss", "first_step", "last_loss", "last_step", "times_seen")
    for index in order.tolist():
        yield finite_or_null({name: state[name][index].item() for name in names})
