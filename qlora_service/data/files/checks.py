"""Dataset check before any job is queued: the number of usable rows, and a finding for every other row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from qlora_service.data.files.formats import RawRow, detect_container, json_row, read_rows
from qlora_service.data.files.splitting import Piece, line_blocks, lines_of
from qlora_service.data.rows.cells import Note
from qlora_service.data.rows.examples import Container, Shape, SourceRow
from qlora_service.data.rows.shapes import REQUIRED, RowProblem, detect_shape, to_example
from qlora_service.data.rows.typed_decoder import count_if_all_usable
from qlora_service.domain.datasets import DatasetReport
from qlora_service.domain.row_warnings import RowWarnings
from qlora_service.errors import Finding, InvalidDataset

MAX_FINDINGS = 100
# Readable rows from which the shape of the whole file is detected.
SHAPE_SAMPLE_ROWS = 20


def check_dataset(
    path: Path,
    *,
    filename: str | None = None,
    container: Container | None = None,
    shape: Shape | None = None,
) -> DatasetReport:
    """The report on every row of the file; container and shape are detected unless given.

    Raises:
        InvalidDataset: the container cannot be detected or is damaged, or no row is usable; the error carries
            the first findings.
    """
    container = container or detect_container(path, filename)
    shape = shape or _majority_shape(path, container)
    usable_rows, finding_count = 0, 0
    findings: list[Finding] = []
    warnings, finding_kinds = RowWarnings(), RowWarnings()
    for result in check_rows(path, container, shape, warnings):
        if isinstance(result, int):
            usable_rows += result
        else:
            finding_count += 1
            finding_kinds.add([result])
            if finding_count <= MAX_FINDINGS:
                findings.append(result)
    rows = usable_rows + finding_count
    if not usable_rows:
        raise _unusable(f"none of its {rows} rows is usable as {shape} read from {container}", findings)
    return DatasetReport(
        container=container,
        shape=shape,
        bytes=path.stat().st_size,
        rows=rows,
        usable_rows=usable_rows,
        finding_count=finding_count,
        findings=tuple(findings),
        warnings=tuple(warnings.kinds),
        finding_kinds=tuple(finding_kinds.kinds),
    )


def check_rows(
    path: Path, container: Container, shape: Shape, warnings: RowWarnings | None = None
) -> Iterator[int | Finding]:
    """In file order: the number of consecutive usable rows, or the finding of one unusable row.

    `warnings` collects the warnings of the usable rows.

    Raises:
        InvalidDataset: the file is damaged.
    """
    warnings = RowWarnings() if warnings is None else warnings
    if container == "jsonl":
        return _check_lines(path, shape, warnings)
    return (_count_or_finding(row, warnings) for row in _parsed_rows(path, container, shape))


def read_examples(path: Path, container: Container, shape: Shape) -> Iterator[SourceRow]:
    """The usable rows in file order: the same rows that `check_dataset` counts.

    Raises:
        InvalidDataset: the file is damaged.
    """
    return (row for row in _parsed_rows(path, container, shape) if isinstance(row, SourceRow))


def _check_lines(path: Path, shape: Shape, warnings: RowWarnings) -> Iterator[int | Finding]:
    """As `check_rows`: counts whole blocks of lines where all are certainly usable, else line by line."""
    with path.open("rb") as file:
        for block in line_blocks(file):
            count = _count(block, shape)
            if count is not None:
                yield count
            else:
                yield from (_check_line(line, shape, warnings) for line in lines_of(block))


def _check_line(line: Piece, shape: Shape, warnings: RowWarnings) -> int | Finding:
    count = _count(line, shape)
    return _count_or_finding(_parse_row(json_row(line), shape), warnings) if count is None else count


def _count(lines: Piece, shape: Shape) -> int | None:
    return None if lines.problem is not None else count_if_all_usable(lines.raw, shape)


def _count_or_finding(row: SourceRow | Finding, warnings: RowWarnings) -> int | Finding:
    if isinstance(row, Finding):
        return row
    if row.warnings:
        warnings.add(row.warnings)
    return 1


def _parsed_rows(path: Path, container: Container, shape: Shape) -> Iterator[SourceRow | Finding]:
    """The example of every row of the file, or its finding."""
    for row in read_rows(path, container):
        yield _parse_row(row, shape)


def _parse_row(row: RawRow, shape: Shape) -> SourceRow | Finding:
    if row.value is None:
        assert row.finding is not None
        return row.finding
    notes: list[Note] = []
    try:
        example = to_example(row.value, shape, notes)
    except RowProblem as problem:
        return Finding(problem.reason, problem.pointer, row.line, row.byte_offset)
    if not notes:
        return SourceRow(example, row.line, row.byte_offset)
    warnings = tuple(Finding(note.reason, note.pointer, row.line, row.byte_offset) for note in notes)
    return SourceRow(example, row.line, row.byte_offset, warnings)


def _majority_shape(path: Path, container: Container) -> Shape:
    """The most frequent shape among the first readable rows."""
    counts: Counter[Shape] = Counter()
    findings: list[Finding] = []
    readable = 0
    for row in read_rows(path, container):
        shape = None if row.value is None else detect_shape(row.value)
        if shape is not None:
            counts[shape] += 1
        elif len(findings) < MAX_FINDINGS:
            # Any shape gives the same finding: the row fits no shape, and the reason lists them all.
            finding = _parse_row(row, next(iter(REQUIRED)))
            assert isinstance(finding, Finding)
            findings.append(finding)
        readable += row.value is not None
        if readable == SHAPE_SAMPLE_ROWS:
            break
    if not counts:
        why = "its rows fit no accepted shape" if readable else "none of its rows can be read"
        raise _unusable(why if findings else "it has no rows", findings)
    return counts.most_common(1)[0][0]


def _unusable(why: str, findings: list[Finding]) -> InvalidDataset:
    first = f" First: {findings[0]}." if findings else ""
    return InvalidDataset(
        f"the dataset cannot be used: {why}.{first} Correct the rows and upload it again", findings=findings
    )
