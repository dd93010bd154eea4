"""Commands for existing jobs: watch, download, jobs, pause, resume, cancel."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_service.cli.exit_codes import CODE_OF_STATUS, ExitCode
from qlora_service.cli.options import AsJson, JobId, Url, connect, format_bytes, print_json, print_note, print_table
from qlora_service.domain.jobs import JobStatus

if TYPE_CHECKING:
    from qlora_service.client import Client
    from qlora_service.client.wire import Job


def watch(job: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Follow a job until it ends.

    Shows phase, step, loss, held-out loss, tokens/s, the time left and warnings, also across a restart of the service.
    A paused job is followed until it is resumed and ends. Ctrl-C stops watching, not the job. The exit code is the
    job's outcome.
    """
    with connect(url) as client:
        watch_to_end(client, job, as_json)


def watch_to_end(client: Client, job_id: str, as_json: bool, printed_warnings: Sequence[str] = ()) -> None:
    """Shows the job's progress until it ends, prints its outcome, and exits with the outcome's code."""
    from rich.console import Console

    from qlora_service.cli.watching import watch_job

    try:
        job = watch_job(client, job_id, Console(stderr=True), printed_warnings)
    except KeyboardInterrupt:
        print_note(f"job {job_id} continues. Watch it: qlora watch {job_id}   Cancel it: qlora cancel {job_id}")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    if as_json:
        print_json(job.model_dump(mode="json"))
    else:
        print_note(_outcome(job))
    raise typer.Exit(CODE_OF_STATUS[job.status])


def download(
    job: JobId,
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Directory for the files; default: one named JOB.")
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Download a succeeded job's adapter and verify every file's SHA-256.

    A job that failed because its loss was not finite has the adapter of its last finite step.
    An interrupted download resumes where it stopped. A directory with other files of the same names is refused.
    Prints the directory.
    """
    target = directory or Path(job)
    with connect(url) as client:
        try:
            files = client.download(job, target)
        except KeyboardInterrupt:
            print_note(f"stopped; the bytes received so far are kept. Resume: qlora download {job} {target}")
            raise typer.Exit(ExitCode.INTERRUPTED) from None
    if as_json:
        print_json([str(file) for file in files])
    else:
        print_note(f"{len(files)} files, {format_bytes(sum(file.stat().st_size for file in files))}, verified")
        typer.echo(str(target))


def list_jobs(
    status: Annotated[JobStatus | None, typer.Option(help="Only jobs with this status.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Only jobs on this base model.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of jobs.")] = 20,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    with connect(url) as client:
        jobs = list(islice(client.jobs(status=status, base_model=base_model), limit))
    if as_json:
        print_json([job.model_dump(mode="json") for job in jobs])
    elif jobs:
        _print_table(jobs)
    else:
        print_note("no jobs")


def pause(job: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Pause a job: a queued job at once, a running job at its next step. Completed steps are saved."""
    with connect(url) as client:
        paused = client.pause(job)
    if as_json:
        print_json(paused.model_dump(mode="json"))
    else:
        when = "" if paused.status == "paused" else " and pauses at its next step"
        print_note(f"job {job} is {paused.status}{when}. Resume it: qlora resume {job}")


def resume(job: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Queue a paused job again; it resumes from its last saved step."""
    with connect(url) as client:
        resumed = client.resume(job)
    if as_json:
        print_json(resumed.model_dump(mode="json"))
    else:
        step = resumed.checkpoint_step
        where = f" and resumes after step {step}" if resumed.status == "queued" and step else ""
        print_note(f"job {job} is {resumed.status}{where}")


def cancel(job: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Cancel a job: at once, or at its next step if it is running."""
    with connect(url) as client:
        cancelled = client.cancel(job)
    if as_json:
        print_json(cancelled.model_dump(mode="json"))
    else:
        print_note(f"job {job} is {cancelled.status}" + ("" if cancelled.terminal else " and stops at its next step"))


def _outcome(job: Job) -> str:
    if job.status == "failed":
        error = job.error or {}
        kept_step = error.get("details", {}).get("kept_step")
        hint = "" if kept_step is None else f"\nThe adapter of step {kept_step} was kept: qlora download {job.id}"
        return f"job {job.id} failed: {error.get('message', 'no reason was recorded')}{hint}"
    hint = f" Download its adapter: qlora download {job.id}" if job.status == "succeeded" else ""
    return f"job {job.id} {job.status} after {job.progress.step} steps.{hint}"


def _print_table(jobs: list[Job]) -> None:
    rows = []
    for job in jobs:
        loss, total = job.metrics.get("loss"), job.progress.total_steps
        rows.append(
            (
                job.id,
                job.status,
                f"{job.progress.step}/{total}" if total else "",
                "" if loss is None else f"{loss:.4f}",
                job.base_model,
                f"{job.created_at.astimezone():%Y-%m-%d %H:%M}",
                job.name or "",
            )
        )
    print_table(("id", "status", "progress", "loss", "base model", "created", "name"), rows)
