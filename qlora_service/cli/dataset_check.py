"""The command `datasets check`: findings in a file of rows, without a service."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_service.cli.exit_codes import ExitCode
from qlora_service.cli.options import (
    AsJson,
    DataDir,
    format_finding,
    open_catalog,
    print_json,
    print_note,
    without_quoted_findings,
)
from qlora_service.domain.row_warnings import RowWarning, counted_rows, first_of_each_kind
from qlora_service.errors import Finding, InvalidDataset, Unavailable
from qlora_service.specs import Container, Shape

if TYPE_CHECKING:
    from qlora_service.data.rendering.report import RenderReport
    from qlora_service.domain.datasets import DatasetReport

ContainerOption = Annotated[Container | None, typer.Option(help="File format; default: detected.")]
ShapeOption = Annotated[Shape | None, typer.Option(help="Row shape; default: detected.")]


@dataclass(frozen=True)
class CheckResult:
    """The result of a check. A file that is refused as a whole has a `refusal` and no `report`.

    `findings` can be read once and are in the order of lines: every finding of the rows, the first ones of rendering.
    """

    findings: Iterable[Finding]
    finding_count: int
    report: DatasetReport | None = None
    lengths: RenderReport | None = None
    refusal: str | None = None


def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, readable=True)],
    base_model: Annotated[
        str | None,
        typer.Option(help="Also render and tokenize the rows for this model, as in `qlora models list`."),
    ] = None,
    max_seq_len_tokens: Annotated[
        int | None, typer.Option(min=1, help="With --base-model: longest allowed row, in tokens; default: as in a job.")
    ] = None,
    container: ContainerOption = None,
    shape: ShapeOption = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Check a file of rows as an upload would be checked. Needs no service.

    Prints a line per finding, `FILE:LINE: POINTER: REASON`, a line per kind of warning,
    `FILE:LINE: POINTER: warning: REASON (ROWS)`, and a summary on stderr. The exit code is 0 without findings, else 1.
    """
    try:
        result = _check(file, container, shape, base_model, max_seq_len_tokens, data_dir)
    except ModuleNotFoundError as error:
        raise Unavailable(
            f"{error.name} is not installed, but Parquet files and --base-model need it: "
            "pip install 'qlora-service[server]'"
        ) from None
    if as_json:
        print_json(result_as_dict(file, result))
    else:
        print_result(file, result)
    raise typer.Exit(ExitCode.REFUSED if result.finding_count or result.refusal else ExitCode.DONE)


def _check(
    file: Path,
    container: Container | None,
    shape: Shape | None,
    base_model: str | None,
    max_seq_len_tokens: int | None,
    data_dir: Path | None,
) -> CheckResult:
    from qlora_service.data.files.checks import check_dataset, check_rows

    try:
        report = check_dataset(file, container=container, shape=shape)
        lengths = None if base_model is None else _lengths(file, report, base_model, max_seq_len_tokens, data_dir)
    except InvalidDataset as error:
        return CheckResult([*error.findings], len(error.findings), refusal=error.message)
    findings: Iterable[Finding] = report.findings
    if report.finding_count > len(report.findings):
        # The report holds the first findings only, because all of them may exceed the memory.
        results = check_rows(file, report.container, report.shape)
        findings = (result for result in results if isinstance(result, Finding))
    if lengths is None:
        return CheckResult(findings, report.finding_count, report)
    rendering_findings = (Finding(**finding) for finding in lengths.findings)
    merged = heapq.merge(findings, rendering_findings, key=lambda finding: finding.line or 0)
    return CheckResult(merged, report.finding_count + lengths.finding_count, report, lengths)


def _lengths(
    file: Path, report: DatasetReport, base_model: str, max_seq_len_tokens: int | None, data_dir: Path | None
) -> RenderReport:
    """The report on rendering every usable row. Raises: InvalidModel, InvalidDataset."""
    from datetime import UTC, datetime

    from qlora_service.actions.submission import default_length
    from qlora_service.data.files.checks import read_examples
    from qlora_service.data.rendering.renderer import Renderer, RenderRules
    from qlora_service.data.rendering.report import render_report
    from qlora_service.models.catalog.embeddings import embedding_rows

    model = open_catalog(data_dir).get(base_model)
    rules = RenderRules(max_seq_len_tokens or default_length(model))
    with Renderer(model.path, rules, datetime.now(UTC), embeddings=embedding_rows(model)) as renderer:
        return render_report(renderer, read_examples(file, report.container, report.shape), report.rows)


def print_result(file: Path, result: CheckResult) -> None:
    """Prints findings and warnings on stdout, the rest on stderr."""
    not_printed = result.finding_count
    for finding in result.findings:
        typer.echo(format_finding(finding, file))
        not_printed -= 1
    if not_printed:
        print_note(f"… and {not_printed} more findings: correct these, and check again. All of them by reason:")
        for kind in _finding_kinds(result):
            print_note(f"  {kind}")
    for warning in _warnings(result):
        typer.echo(_format_warning(warning, file))
    if result.refusal is not None:
        print_note(f"error: {without_quoted_findings(result.refusal, result.findings)}")
    if result.report is not None:
        print_note(f"{file}: {_summary(result.report, result.lengths)}")


def _finding_kinds(result: CheckResult) -> list[RowWarning]:
    read = () if result.report is None else result.report.finding_kinds
    rendered = [] if result.lengths is None else result.lengths.finding_kinds
    return [*read, *(RowWarning(**kind) for kind in rendered)]


def _warnings(result: CheckResult) -> list[RowWarning]:
    read = () if result.report is None else result.report.warnings
    rendered = () if result.lengths is None else result.lengths.warnings
    return first_of_each_kind(read, (RowWarning(**warning) for warning in rendered))


def _format_warning(warning: RowWarning, file: Path) -> str:
    rows = "1 row" if warning.rows == 1 else f"{counted_rows(warning.rows)}: {warning.first_lines}"
    first = Finding(f"warning: {warning.reason} ({rows})", warning.pointer, warning.lines[0] if warning.lines else None)
    return format_finding(first, file)


def _summary(report: DatasetReport, lengths: RenderReport | None) -> str:
    usable = report.usable_rows if lengths is None else lengths.usable_rows
    parts = [f"{report.container} of {report.shape} rows", f"{usable} of {report.rows} rows can be used"]
    if lengths is not None:
        parts.append(f"{lengths.tokens} tokens, {lengths.trained_tokens} of them trained")
        parts.append(f"the longest row has {lengths.longest_tokens} tokens")
    return "; ".join(parts)


def result_as_dict(file: Path, result: CheckResult) -> dict[str, Any]:
    """The result in JSON types."""
    report = {} if result.report is None else result.report.as_dict()
    return {
        **report,
        "file": str(file),
        "refusal": result.refusal,
        "finding_count": result.finding_count,
        "findings": [finding.as_dict() for finding in result.findings],
        "lengths": None if result.lengths is None else asdict(result.lengths),
    }
