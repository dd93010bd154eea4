"""The command `datasets check`: what is wrong with a file of rows, told without a service."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_service.cli.exit_codes import ExitCode
from qlora_service.cli.options import AsJson, DataDir, in_file, open_catalog, print_json, print_note, told_below
from qlora_service.errors import Finding, InvalidDataset, Unavailable
from qlora_service.specs import Container, Shape

if TYPE_CHECKING:
    from qlora_service.data.rendering.renderer import RenderReport
    from qlora_service.domain.datasets import DatasetReport

ContainerOption = Annotated[Container | None, typer.Option(help="File format; detected if not given.")]
ShapeOption = Annotated[Shape | None, typer.Option(help="Row shape; detected if not given.")]


@dataclass(frozen=True)
class Checked:
    """What was found: of a file that is refused as a whole there is no `report`, but a `refusal`.

    `findings` are read once, in the order of their lines: those of the rows all, those of rendering the first of them.
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
        int | None, typer.Option(min=1, help="With --base-model: longest row, in tokens; default: as in a job.")
    ] = None,
    container: ContainerOption = None,
    shape: ShapeOption = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Check a file of rows as an upload would be checked; no service need run.

    Prints a line per finding, `FILE:LINE: POINTER: REASON`, and a summary on stderr. The exit code is 0 when there are
    none, else 1.
    """
    try:
        checked = _check(file, container, shape, base_model, max_seq_len_tokens, data_dir)
    except ModuleNotFoundError as error:
        raise Unavailable(
            f"{error.name} is not installed, which Parquet files and --base-model need: "
            "pip install 'qlora-service[server]'"
        ) from None
    if as_json:
        print_json(_as_dict(file, checked))
    else:
        _print(file, checked)
    raise typer.Exit(ExitCode.REFUSED if checked.finding_count or checked.refusal else ExitCode.DONE)


def _check(
    file: Path,
    container: Container | None,
    shape: Shape | None,
    base_model: str | None,
    max_seq_len_tokens: int | None,
    data_dir: Path | None,
) -> Checked:
    from qlora_service.data.files.checks import check_dataset, check_rows

    try:
        report = check_dataset(file, container=container, shape=shape)
        lengths = None if base_model is None else _lengths(file, report, base_model, max_seq_len_tokens, data_dir)
    except InvalidDataset as error:
        return Checked([*error.findings], len(error.findings), refusal=error.message)
    findings: Iterable[Finding] = report.findings
    if report.finding_count > len(report.findings):
        # The report keeps the first: all of them may be more than the memory holds.
        verdicts = check_rows(file, report.container, report.shape)
        findings = (verdict for verdict in verdicts if isinstance(verdict, Finding))
    if lengths is None:
        return Checked(findings, report.finding_count, report)
    rendered = (Finding(**finding) for finding in lengths.findings)
    merged = heapq.merge(findings, rendered, key=lambda finding: finding.line or 0)
    return Checked(merged, report.finding_count + lengths.finding_count, report, lengths)


def _lengths(
    file: Path, report: DatasetReport, base_model: str, max_seq_len_tokens: int | None, data_dir: Path | None
) -> RenderReport:
    """What rendering every usable row gives. Raises: InvalidModel, InvalidDataset."""
    from datetime import UTC, datetime

    from qlora_service.actions.submission import default_length
    from qlora_service.data.files.checks import read_examples
    from qlora_service.data.rendering.renderer import Renderer, RenderRules, render_report

    model = open_catalog(data_dir).get(base_model)
    rules = RenderRules(max_seq_len_tokens or default_length(model))
    with Renderer(model.path, rules, datetime.now(UTC)) as renderer:
        return render_report(renderer, read_examples(file, report.container, report.shape), report.rows)


def _print(file: Path, checked: Checked) -> None:
    unseen = checked.finding_count
    for finding in checked.findings:
        typer.echo(in_file(finding, file))
        unseen -= 1
    if unseen:
        print_note(f"… and {unseen} more findings: correct these, and check again")
    if checked.refusal is not None:
        print_note(f"error: {told_below(checked.refusal, checked.findings)}")
    if checked.report is not None:
        print_note(f"{file}: {_summary(checked.report, checked.lengths)}")


def _summary(report: DatasetReport, lengths: RenderReport | None) -> str:
    usable = report.usable_rows if lengths is None else lengths.usable_rows
    parts = [f"{report.container} of {report.shape} rows", f"{usable} of {report.rows} rows can be used"]
    if lengths is not None:
        parts.append(f"{lengths.tokens} tokens, {lengths.trained_tokens} of them trained")
        parts.append(f"the longest row has {lengths.longest_tokens}")
    return "; ".join(parts)


def _as_dict(file: Path, checked: Checked) -> dict[str, Any]:
    report = {} if checked.report is None else checked.report.as_dict()
    return {
        **report,
        "file": str(file),
        "refusal": checked.refusal,
        "finding_count": checked.finding_count,
        "findings": [finding.as_dict() for finding in checked.findings],
        "lengths": None if checked.lengths is None else asdict(checked.lengths),
    }
