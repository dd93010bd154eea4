"""A stored dataset, and the report of its check."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from qlora_service.domain.row_warnings import RowWarning, RowWarnings
from qlora_service.errors import Finding
from qlora_service.specs import Container, Shape


@dataclass(frozen=True)
class DatasetReport:
    """Result of a dataset's check. `rows` counts all rows; `findings` are the first of exactly `finding_count`."""

    container: Container
    shape: Shape
    bytes: int
    rows: int
    usable_rows: int
    finding_count: int
    findings: tuple[Finding, ...]
    finding_kinds: tuple[RowWarning, ...] = ()
    """The findings of all unusable rows, by kind"""
    warnings: tuple[RowWarning, ...] = ()
    """Of usable rows: parts that are not trained, or not as one would expect"""

    def as_dict(self) -> dict[str, Any]:
        """The report in JSON types."""
        return asdict(self) | {
            "findings": [finding.as_dict() for finding in self.findings],
            "finding_kinds": [kind.as_dict() for kind in self.finding_kinds],
            "warnings": [warning.as_dict() for warning in self.warnings],
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> DatasetReport:
        """The report of an `as_dict` value; one that an earlier version stored has the kinds of its findings."""
        findings = tuple(Finding(**finding) for finding in value["findings"])
        kinds = (
            (RowWarning(**kind) for kind in value["finding_kinds"]) if "finding_kinds" in value else _kinds(findings)
        )
        warnings = (RowWarning(**warning) for warning in value.get("warnings", ()))
        return cls(**value | {"findings": findings, "finding_kinds": tuple(kinds), "warnings": tuple(warnings)})


@dataclass(frozen=True)
class Dataset:
    """A checked and stored upload. The same bytes, read in the same way, are one dataset of a project."""

    id: str
    project: str
    sha256: str
    filename: str | None
    created_at: datetime
    report: DatasetReport


def _kinds(findings: Iterable[Finding]) -> tuple[RowWarning, ...]:
    """The kinds of findings that are of a row each."""
    collected = RowWarnings()
    for finding in findings:
        collected.add([finding])
    return tuple(collected.kinds)
