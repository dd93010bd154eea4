"""What the commands share: options, the connection, and how values and errors are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_service.errors import Finding

if TYPE_CHECKING:
    from qlora_service.client import Client

SHOWN_FINDINGS = 20

Url = Annotated[
    str | None,
    typer.Option("--url", help="Address of the service; default: $QLORA_URL, else http://127.0.0.1:8080."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="The service's data directory; default: $QLORA_DATA_DIR, else ./data."),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, as printed by submit and jobs.")]


class FaultsInFile(Exception):
    """What a user's file has wrong; the findings' lines are lines of that file."""

    def __init__(self, file: Path, message: str, findings: Sequence[Finding]) -> None:
        super().__init__(file, message, findings)
        self.file = file
        self.message = message
        self.findings = tuple(findings)


def connect(url: str | None) -> Client:
    from qlora_service.client import Client
    from qlora_service.settings import read_settings

    return Client(read_settings(url=url).base_url)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_note(text: str) -> None:
    """Prints to stderr: stdout is for what scripts read."""
    typer.echo(text, err=True)


def print_error(message: str, findings: Sequence[Finding], file: Path | None = None) -> None:
    """Prints one error, and its findings one a line: `file:line: pointer: reason` where they are of a file."""
    lines = [f"error: {message}"]
    for finding in findings[:SHOWN_FINDINGS]:
        if file is None and str(finding) in message:
            continue  # the message is this one finding
        if file is None:
            lines.append(f"  {finding}")
        else:
            place = f"{file}:{finding.line}" if finding.line is not None else str(file)
            lines.append(f"{place}: {replace(finding, line=None)}")
    if len(findings) > SHOWN_FINDINGS:
        lines.append(f"  … and {len(findings) - SHOWN_FINDINGS} more")
    sys.stdout.flush()
    print_note("\n".join(lines))
