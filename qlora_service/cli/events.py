"""The command `logs`: the events of a job, one line each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_service.cli.exit_codes import CODE_OF_STATUS, ExitCode
from qlora_service.cli.options import JobId, Url, connect, print_note

if TYPE_CHECKING:
    from qlora_service.client import Event

LEADING_FIELDS = ("status", "message", "step")
"""Fields at the start of a line, if the event has them."""


def logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Print new events until the job ends.")] = False,
    after: Annotated[int, typer.Option(min=0, help="Only events after this number.")] = 0,
    url: Url = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line, for scripts.")] = False,
) -> None:
    """Print the events of a job, a line each: status changes, steps, evaluations, messages.

    With -f, continues until the job ends, also across a restart of the service, and exits with the job's outcome.
    Ctrl-C stops following, not the job.
    """
    last = after
    with connect(url) as client:
        try:
            for event in client.watch(job, after) if follow else client.events(job, after):
                typer.echo(_as_json(event) if as_json else _line(event))
                last = event.seq
        except KeyboardInterrupt:
            print_note(f"job {job} continues. Follow it from here: qlora logs {job} -f --after {last}")
            raise typer.Exit(ExitCode.INTERRUPTED) from None
        if follow:
            raise typer.Exit(CODE_OF_STATUS[client.get(job).status])


def _as_json(event: Event) -> str:
    return json.dumps({"seq": event.seq, "type": event.type, "data": event.data}, ensure_ascii=False)


def _line(event: Event) -> str:
    """Such as `2026-11-22 10:00:03  metrics     step=3 loss=0.4 …`."""
    data = {key: value for key, value in event.data.items() if key not in ("at", "job_id") and value is not None}
    leading = {key: data.pop(key) for key in LEADING_FIELDS if key in data}
    fields = " ".join(_format_field(key, value) for key, value in (leading | data).items())
    return f"{event.at.astimezone():%Y-%m-%d %H:%M:%S}  {event.type:<10}  {fields}"


def _format_field(name: str, value: Any) -> str:
    if name in ("status", "message"):
        return str(value)
    if isinstance(value, float):
        return f"{name}={value:.6g}"
    if isinstance(value, dict) and "message" in value:
        value = value["message"]
    return f"{name}={value}" if isinstance(value, int) else f"{name}={json.dumps(value, ensure_ascii=False)}"
