"""Warnings about rows, by kind: usable rows that are not trained as one would expect, and rows that are left out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from qlora_service.errors import Finding

MAX_KINDS = 50
MAX_LINES = 5
OTHER = f"further reasons, beside the {MAX_KINDS} that are listed"


@dataclass
class RowWarning:
    """All warnings of one kind: how many rows have it, the first of these lines, and where in the first row."""

    reason: str
    pointer: str = ""
    rows: int = 0
    lines: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def first_lines(self) -> str:
        """Such as `line 3`, or `line 1, 2, 3, 4, 5, …`."""
        more = ", …" if self.rows > len(self.lines) else ""
        return f"line {', '.join(map(str, self.lines))}{more}"

    def __str__(self) -> str:
        place = f" at {self.pointer}" if self.pointer else ""
        return f"{counted_rows(self.rows)} ({self.first_lines}{place}): {self.reason}"


class RowWarnings:
    """Collects warnings by kind. Two reasons that differ in numbers only are of one kind.

    Rows of more than `MAX_KINDS` kinds are counted together, as `OTHER`.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, RowWarning] = {}

    def add(self, warnings: Iterable[Finding]) -> None:
        """Counts the warnings of one row, each kind once."""
        counted = set()
        for warning in warnings:
            kind, reason, pointer = _kind(warning.reason), warning.reason, warning.pointer
            if kind not in self._kinds and len(self._kinds) >= MAX_KINDS:
                kind, reason, pointer = OTHER, OTHER, ""
            if kind in counted:
                continue
            counted.add(kind)
            collected = self._kinds.setdefault(kind, RowWarning(reason, pointer))
            collected.rows += 1
            if warning.line is not None and len(collected.lines) < MAX_LINES:
                collected.lines.append(warning.line)

    @property
    def kinds(self) -> list[RowWarning]:
        """A warning per kind, the most frequent first; `OTHER` last."""
        return sorted(self._kinds.values(), key=lambda warning: (warning.reason == OTHER, -warning.rows))


def first_of_each_kind(*groups: Iterable[RowWarning]) -> list[RowWarning]:
    """The warnings of all groups; of a kind in several groups, the first group's."""
    kinds: dict[str, RowWarning] = {}
    for group in groups:
        for warning in group:
            kinds.setdefault(_kind(warning.reason), warning)
    return list(kinds.values())


def warning_texts(left_out: Iterable[RowWarning], warnings: Iterable[RowWarning]) -> list[str]:
    """A text per kind, for users: of rows that are left out, then of usable rows."""
    return [*(f"left out: {kind}" for kind in left_out), *map(str, warnings)]


def counted_rows(rows: int) -> str:
    """Such as `1 row`, `3 rows`."""
    return "1 row" if rows == 1 else f"{rows} rows"


def _kind(reason: str) -> str:
    return re.sub(r"\d+", "0", reason)
