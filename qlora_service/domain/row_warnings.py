"""Warnings about usable rows: parts of a row that are not trained, or not as one would expect."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from qlora_service.errors import Finding

MAX_KINDS = 50
MAX_LINES = 5


@dataclass
class RowWarning:
    """All warnings of one kind: how many rows have it, the first of these lines, and where in the first row."""

    reason: str
    pointer: str = ""
    rows: int = 0
    lines: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        more = ", …" if self.rows > len(self.lines) else ""
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        place = f" at {self.pointer}" if self.pointer else ""
        return f"{rows} (line {', '.join(map(str, self.lines))}{more}{place}): {self.reason}"


class RowWarnings:
    """Collects warnings by kind. Two reasons that differ in numbers only are of one kind."""

    def __init__(self) -> None:
        self._kinds: dict[str, RowWarning] = {}

    def add(self, warnings: Iterable[Finding]) -> None:
        """Counts the warnings of one row, each kind once."""
        first_by_kind: dict[str, Finding] = {}
        for warning in warnings:
            first_by_kind.setdefault(re.sub(r"\d+", "0", warning.reason), warning)
        for kind, warning in first_by_kind.items():
            if kind not in self._kinds:
                if len(self._kinds) == MAX_KINDS:
                    continue
                self._kinds[kind] = RowWarning(warning.reason, warning.pointer)
            collected = self._kinds[kind]
            collected.rows += 1
            if warning.line is not None and len(collected.lines) < MAX_LINES:
                collected.lines.append(warning.line)

    @property
    def kinds(self) -> list[RowWarning]:
        """A warning per kind, the most frequent first."""
        return sorted(self._kinds.values(), key=lambda warning: -warning.rows)
