"""Every training row's loss when it was first and last seen, so that a user finds the rows the model cannot learn."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlora_service.domain.metrics import finite_or_null

PAGE_LINES = 64
"""Lines kept together: a page of 28 bytes a line is made when one of its lines is first seen, so that neither a million
rows in order nor a few rows of a long file take much."""
RECORD = np.dtype(
    [
        ("first_loss", np.float64),
        ("last_loss", np.float64),
        ("first_step", np.int32),
        ("last_step", np.int32),
        ("times_seen", np.int32),
    ]
)
State = dict[str, "np.ndarray[Any, Any]"]


class RowLosses:
    """Losses by line of the upload."""

    def __init__(self) -> None:
        self._pages = _pages()

    def record(self, step: int, lines: Sequence[int], losses: Sequence[float]) -> None:
        """Note that `step` saw the rows at `lines` (counted from 1), each with its loss."""
        for line, loss in zip(lines, losses, strict=True):
            page, place = divmod(line, PAGE_LINES)
            seen = self._pages[page][place]
            if seen["times_seen"] == 0:
                seen["first_loss"], seen["first_step"] = loss, step
            seen["last_loss"], seen["last_step"] = loss, step
            seen["times_seen"] += 1

    def write(self, path: Path) -> None:
        """One JSON object a line: the rows that were seen, those with the highest last loss first.

        A loss that is no finite number is written as null, and its row stands before all others.
        """
        state = self.state()
        last, lines = state["last_loss"], state["line"]
        worst_first = np.lexsort((lines, -np.where(np.isfinite(last), last, np.inf)))
        with path.open("w", encoding="utf-8") as file:
            for record in _records(state, worst_first):
                file.write(json.dumps(record) + "\n")

    def state(self) -> State:
        """Arrays of equal length, one entry for each line seen, in the order of the lines."""
        numbers = sorted(self._pages)
        table = np.concatenate([np.zeros(0, RECORD), *(self._pages[number] for number in numbers)])
        starts = np.array(numbers, np.int64)[:, None] * PAGE_LINES
        lines = (starts + np.arange(PAGE_LINES)).ravel()
        seen = table["times_seen"] > 0
        return {"line": lines[seen]} | {name: table[name][seen] for name in RECORD.names or ()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what `state` describes: its arrays, or lists of the same numbers."""
        pages, places = np.divmod(np.asarray(state["line"], np.int64), PAGE_LINES)
        table = np.zeros(len(pages), RECORD)
        for name in RECORD.names or ():
            table[name] = state[name]
        self._pages = _pages()
        # Lines ascend, so that those of a page stand together.
        starts = np.flatnonzero(np.diff(pages, prepend=-1))
        for first, last in zip(starts, np.append(starts, len(pages))[1:], strict=True):
            self._pages[int(pages[first])][places[first:last]] = table[first:last]


def _pages() -> defaultdict[int, np.ndarray[Any, Any]]:
    return defaultdict(lambda: np.zeros(PAGE_LINES, RECORD))


def _records(state: State, order: np.ndarray[Any, Any]) -> Iterator[dict[str, Any]]:
    names = ("line", "first_loss", "first_step", "last_loss", "last_step", "times_seen")
    for index in order.tolist():
        yield finite_or_null({name: state[name][index].item() for name in names})
