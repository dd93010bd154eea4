"""Commands for datasets: check, upload, list, show, preview, delete."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_service.cli.dataset_check import ContainerOption, ShapeOption, check
from qlora_service.cli.options import (
    AsJson,
    DatasetId,
    InvalidFile,
    MaxSeqLen,
    Url,
    connect,
    format_bytes,
    print_json,
    print_note,
    print_table,
    printable,
)
from qlora_service.cli.preview import preview
from qlora_service.domain.row_warnings import first_of_each_kind, warning_texts

if TYPE_CHECKING:
    from qlora_service.client import Dataset
    from qlora_service.client.wire import Lengths

app = typer.Typer(help="Check, upload, inspect and delete datasets, the rows that jobs train on.", no_args_is_help=True)
app.command()(check)
app.command()(preview)


@app.command()
def upload(
    file: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, readable=True)],
    container: ContainerOption = None,
    shape: ShapeOption = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Upload a file of rows, for jobs that use it with --dataset-id. Prints the dataset's id."""
    from qlora_service.client.wire import ServiceError

    with connect(url) as client:
        try:
            dataset = client.upload(file, container=container, shape=shape)
        except ServiceError as error:
            if not any(finding.line for finding in error.findings):
                raise
            raise InvalidFile(file, error.message, error.findings) from None
    if as_json:
        print_json(dataset.model_dump(mode="json"))
        return
    for text in warning_texts(dataset.finding_kinds, dataset.warnings):
        print_note(f"warning: {text}")
    typer.echo(dataset.id)


@app.command("list")
def list_datasets(
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of datasets.")] = 20,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List datasets, newest first."""
    with connect(url) as client:
        datasets = list(islice(client.datasets(), limit))
    if as_json:
        print_json([dataset.model_dump(mode="json") for dataset in datasets])
    elif datasets:
        _print_list(datasets)
    else:
        print_note("no datasets yet. Add one: qlora datasets upload FILE")


@app.command()
def show(
    dataset: DatasetId,
    base_model: Annotated[str | None, typer.Option(help="Also show the rows' lengths in tokens of this model.")] = None,
    max_seq_len_tokens: MaxSeqLen = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show a dataset's counts, findings and warnings; with --base-model also its rows' lengths in tokens."""
    with connect(url) as client:
        shown = client.dataset(dataset, base_model=base_model, max_seq_len_tokens=max_seq_len_tokens)
    if as_json:
        print_json(shown.model_dump(mode="json"))
    else:
        _print_one(shown)


@app.command()
def delete(dataset: DatasetId, url: Url = None, as_json: AsJson = False) -> None:
    """Delete a dataset. Jobs that were trained on it, and their adapters, are kept."""
    with connect(url) as client:
        client.delete_dataset(dataset)
    if as_json:
        print_json({"id": dataset, "deleted": True})
    else:
        print_note(f"deleted {dataset}")


def _print_list(datasets: list[Dataset]) -> None:
    rows = [
        (
            dataset.id,
            dataset.filename or "",
            f"{dataset.container} of {dataset.shape}",
            f"{dataset.usable_rows}/{dataset.rows}",
            format_bytes(dataset.bytes),
            f"{dataset.created_at.astimezone():%Y-%m-%d %H:%M}",
        )
        for dataset in datasets
    ]
    print_table(("id", "file", "format", "usable", "size", "created"), rows)


def _print_one(dataset: Dataset) -> None:
    facts = [
        ("id", dataset.id),
        ("file", dataset.filename or ""),
        ("sha256", dataset.sha256),
        ("format", f"{dataset.container} of {dataset.shape}, {format_bytes(dataset.bytes)}"),
        ("usable", f"{dataset.usable_rows} of {dataset.rows} rows"),
    ]
    if (lengths := dataset.lengths) is not None:
        sample = "" if lengths.complete else f", of the first {lengths.rows} rows"
        facts += [
            ("tokens", f"{lengths.tokens}, {lengths.trained_tokens} of them trained{sample}"),
            ("longest row", f"{lengths.longest_tokens} tokens"),
            *((f"up to {length}", f"{rows} rows") for length, rows in lengths.histogram.items()),
        ]
    for name, value in facts:
        typer.echo(f"{name:<12}  {value}")
    _print_rows(dataset, *([] if lengths is None else [lengths]))


def _print_rows(*reports: Dataset | Lengths) -> None:
    """Prints the findings, all of them by reason where only the first are known, and the warnings."""
    findings = [finding for report in reports for finding in report.findings]
    for finding in findings:
        place = f"line {finding.get('line')}" + (f" at {finding['pointer']}" if finding.get("pointer") else "")
        typer.echo(printable(f"{place}: {finding['reason']}"))
    are_all_printed = len(findings) == sum(report.finding_count for report in reports)
    left_out = [] if are_all_printed else [kind for report in reports for kind in report.finding_kinds]
    for text in warning_texts(left_out, first_of_each_kind(*(report.warnings for report in reports))):
        typer.echo(printable(f"warning: {text}"))
