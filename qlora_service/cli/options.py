"""Shared parts of the commands: options, the connection, and the printing of values and errors."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_service.errors import Finding, InvalidRequest, QLoRAError

if TYPE_CHECKING:
    from qlora_service.client import Client
    from qlora_service.models.catalog.catalog import Catalog

MAX_PRINTED_FINDINGS = 20
MAX_COMPLETIONS = 20
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_CONTROL_IN_LINE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

Url = Annotated[
    str | None,
    typer.Option("--url", help="Address of the service; default: $QLORA_URL, else http://127.0.0.1:8080."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="The service's data directory; default: $QLORA_DATA_DIR, else ./data."),
]
DatasetId = Annotated[str, typer.Argument(metavar="DATASET", help="A dataset's id, as printed by upload and list.")]
MaxSeqLen = Annotated[int | None, typer.Option(min=1, help="Longest allowed row, in tokens; default: as in a job.")]


def complete_job_ids(incomplete: str) -> list[tuple[str, str]]:
    """Ids of the newest jobs that start with `incomplete`, each with its status; none if no service answers."""
    from qlora_service.client.wire import ServiceError

    try:
        with connect(None, patience_s=0.0) as client:
            jobs = list(islice(client.jobs(), MAX_COMPLETIONS))
    except (QLoRAError, ServiceError):
        return []
    return [(job.id, job.status) for job in jobs if job.id.startswith(incomplete)]


JobId = Annotated[
    str,
    typer.Argument(metavar="JOB", help="A job's id, as printed by submit and jobs.", autocompletion=complete_job_ids),
]


class WrongUsage(InvalidRequest):
    """The arguments or settings cannot work: no request was sent."""


class InvalidFile(Exception):
    """Errors in a user's file; the lines of the findings are lines of that file."""

    def __init__(self, file: Path, message: str, findings: Sequence[Finding]) -> None:
        super().__init__(file, message, findings)
        self.file = file
        self.message = message
        self.findings = tuple(findings)


def connect(url: str | None, *, patience_s: float | None = None) -> Client:
    """A client of the service at `url` or at the settings' URL, with the settings' key. Each outage prints a note.

    Raises:
        WrongUsage: the address or the key is not valid.
    """
    from qlora_service.client import PATIENCE_S, Client
    from qlora_service.settings import read_settings

    settings = read_settings(url=url)
    key = None if settings.api_key is None else settings.api_key.get_secret_value()
    patience_s = PATIENCE_S if patience_s is None else patience_s
    try:
        return Client(settings.base_url, api_key=key or None, patience_s=patience_s, on_drop=_note_outage)
    except InvalidRequest as error:
        raise WrongUsage(error.message) from None


def open_catalog(data_dir: Path | None) -> Catalog:
    """The base models of the data directory. Needs no service."""
    from qlora_service.models.catalog.catalog import Catalog
    from qlora_service.process.logging import configure_logging
    from qlora_service.settings import read_settings

    configure_logging("WARNING")
    return Catalog(read_settings(data_dir=data_dir).models_dir)


def print_json(value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    typer.echo(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def print_note(text: str) -> None:
    """Prints to stderr, because scripts read stdout."""
    typer.echo(printable(text), err=True)


def printable(text: str, *, in_line: bool = False) -> str:
    r"""The text with control characters, which a terminal would obey, as escapes such as \x1b.

    Overrides of the writing direction are among them; `in_line`: tabs and line breaks, too.
    """
    return (_CONTROL_IN_LINE if in_line else _CONTROL).sub(lambda found: ascii(found[0])[1:-1], text)


def print_error(message: str, findings: Sequence[Finding], file: Path | None = None) -> None:
    """Prints the error and a line per finding: `file:line: pointer: reason` if the findings are of `file`."""
    lines = [f"error: {message if file is None else without_quoted_findings(message, findings)}"]
    for finding in findings[:MAX_PRINTED_FINDINGS]:
        if file is None and str(finding) in message:
            continue  # the message is this one finding
        lines.append(f"  {finding}" if file is None else format_finding(finding, file))
    if len(findings) > MAX_PRINTED_FINDINGS:
        lines.append(f"  … and {len(findings) - MAX_PRINTED_FINDINGS} more")
    sys.stdout.flush()
    print_note("\n".join(lines))


def without_quoted_findings(message: str, findings: Iterable[Finding]) -> str:
    """The message with each quoted finding cut to its line number, for output with a line per finding."""
    for finding in findings:
        if finding.line is not None:
            message = message.replace(str(finding), f"line {finding.line}")
    return message


def format_finding(finding: Finding, file: Path) -> str:
    """`file:line: pointer: reason`, the format that compilers print and editors read."""
    place = f"{file}:{finding.line}" if finding.line is not None else str(file)
    return printable(f"{place}: {replace(finding, line=None)}", in_line=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints the rows under their columns. The first column is never wrapped, so that ids can be copied."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 200
    Console(width=width, markup=False, highlight=False).print(table)


def format_bytes(count: float) -> str:
    """Such as 12 KiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _note_outage(error: Exception, patience_s: float) -> None:
    # The message's advice follows its first colon, and the client follows it already.
    reason = str(error).partition(": ")[0]
    print_note(f"the service is not answering ({reason}): trying again for up to {patience_s:.0f} s")
