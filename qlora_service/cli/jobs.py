"""Commands about jobs that exist: watch, download, jobs, pause, resume, cancel."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_service.cli.exit_codes import OF_OUTCOME, ExitCode
from qlora_service.cli.options import AsJson, JobId, Url, connect, print_json, print_note, print_table, size
from qlora_service.domain.jobs import JobStatus

if TYPE_CHECKING:
    from qlora_service.client import Client
    from qlora_service.client.wire import Job


def watch(job: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Follow a job until it ends.

    Shows phase, step, loss, held-out loss, tokens/s and the time left, also across a restart of the service. Ctrl-C
    stops watching, not the job; a paused one is waited for. The exit code is the job's outcome.
    """
    with connect(url) as client:
        watch_to_end(client, job, as_json)


def watch_to_end(client: Client, job_id: str, as_json: bool) -> None:
    """Watches, prints the outcome and exits with its code."""
    from rich.console import Console

    from qlora_service.cli.watching import watch_job

    try:
        job = watch_job(client, job_id, Console(stderr=True))
    except KeyboardInterrupt:
        print_note(f"job {job_id} goes on. Watch it: qlora watch {job_id}   Cancel it: qlora cancel {job_id}")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    if as_json:
        print_json(job.model_dump(mode="json"))
    else:
        print_note(_outcome(job))
    raise typer.Exit(OF_OUTCOME[job.status])


def download(
    job: JobId,
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Where to put the files; default: a directory named JOB.")
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Download a succeeded job's adapter and verify every file's SHA-256.

    Of a job that ended because its loss was not finite, it is the adapter of the last finite step.
    A broken-off download goes on where it stopped; a directory that holds other files of these names is refused.
    Prints the directory.
    """
    target = directory or Path(job)
    with connect(url) as client:
        try:
            files = client.download(job, target)
        except KeyboardInterrupt:
            print_note(f"stopped; what has arrived is kept. Go on with it: qlora download {job} {target}")
            raise typer.Exit(ExitCode.INTERRUPTED) from None
    if as_json:
        print_json([str(file) for file in files])
    else:
        print_note(f"{len(files)} files, {size(sum(file.stat().st_size for file in files))}, verified")
        typer.echo(str(target))


def list_jobs(
    status: Annotated[JobStatus | None, typer.Option(help="Only jobs with this status.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Only jobs on this base model.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many to list.")] = 20,
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
    """Pause a job: at once while it is queued, at its next step while it runs. Its steps are saved."""
    with connect(url) as client:
        paused = client.pause(job)
    if as_json:
        print_json(paused.model_dump(mode="json"))
    else:
        when = "" if paused.status == "paused" else " and pauses at its next step"
        print_note(f"job {job} is {paused.status}{when}. Go on: qlora resume {job}")


def resume(job: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Put a paused job back into the queue; it goes on from its last saved step."""
    with connect(url) as client:
        resumed = client.resume(job)
    if as_json:
        print_json(resumed.model_dump(mode="json"))
    else:
        step = resumed.checkpoint_step
        where = f" and goes on after step {step}" if resumed.status == "queued" and step else ""
        print_note(f"job {job} is {resumed.status}{where}")


def cancel(job: JobId, url: Url = None, as_json: AsJson = False) -> None:
    """Cancel a job: at once, or at its next step while it runs."""
    with connect(url) as client:
        cancelled = client.cancel(job)
    if as_json:
        print_json(cancelled.model_dump(mode="json"))
    else:
        print_note(f"job {job} is {cancelled.status}" + ("" if cancelled.terminal else " and stops at its next step"))


def _outcome(job: Job) -> str:
    if job.status == "failed":
        error = job.error or {}
        kept = error.get("details", {}).get("kept_step")
        left = "" if kept is None else f"\nThe adapter of step {kept} was kept: qlora download {job.id}"
        return f"job {job.id} failed: {error.get('message', 'no reason was recorded')}{left}"
    after = f" Download its adapter: qlora download {job.id}" if job.status == "succeeded" else ""
    return f"job {job.id} {job.status} after {job.progress.step} steps.{after}"


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
