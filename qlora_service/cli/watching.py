"""A job's progress in the terminal, until the job ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from qlora_service.cli.options import printable
from qlora_service.client import Client
from qlora_service.client.wire import Job

POLL_S = 0.5
LINE_S = 5.0
"""Shortest time between two lines about the same phase, in output without a terminal."""

Show = Callable[[Job, str], None]
"""Displays a job and its phase."""

_STOPPING = {"cancel": "cancelling", "pause": "pausing", "preempt": "preempted, releasing the slot"}


def watch_job(client: Client, job_id: str, console: Console, printed_warnings: Sequence[str] = ()) -> Job:
    """Shows the job's progress, as a bar on a terminal, else as lines, and its warnings; the job once it has ended.

    Waits for a service that is away meanwhile.
    """
    display = _bar if console.is_terminal else _lines
    printed = set(printed_warnings)
    with display(console) as show:
        job = client.get(job_id)
        while True:
            _print_warnings(console, job, printed)
            if job.terminal:
                break
            show(job, _phase(job))
            time.sleep(POLL_S)
            job = client.refresh(job_id, on_drop=partial(_show_outage, show, job))
        show(job, job.status)
    return job


def format_duration(seconds: float) -> str:
    """Such as 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def _bar(console: Console) -> Iterator[Show]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[steps]}"),
        TextColumn("{task.fields[figures]}"),
    )
    held_out = _LatestHeldOutLoss()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None, steps="", figures="")

        def show(job: Job, phase: str) -> None:
            total = job.progress.total_steps
            progress.update(
                task,
                description=escape(phase),
                total=total,
                completed=job.progress.step,
                steps=f"{job.progress.step}/{total} steps" if total else "",
                figures=_figures(job, held_out.update(job)),
            )

        yield show


@contextmanager
def _lines(console: Console) -> Iterator[Show]:
    held_out, last_phase, last_line, last_at = _LatestHeldOutLoss(), "", "", 0.0

    def show(job: Job, phase: str) -> None:
        nonlocal last_phase, last_line, last_at
        total = job.progress.total_steps
        steps = f"step {job.progress.step}/{total}" if total else ""
        line = " · ".join(part for part in (phase, steps, _figures(job, held_out.update(job))) if part)
        now = time.monotonic()
        if phase != last_phase or (line != last_line and now - last_at >= LINE_S):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            last_phase, last_line, last_at = phase, line, now

    yield show


class _LatestHeldOutLoss:
    """The latest held-out loss, kept because a job's latest metrics may not contain one."""

    def __init__(self) -> None:
        self.loss: float | None = None

    def update(self, job: Job) -> float | None:
        loss = job.metrics.get("eval_loss")
        self.loss = self.loss if loss is None else float(loss)
        return self.loss


def _print_warnings(console: Console, job: Job, printed: set[str]) -> None:
    """Prints the warnings that are not in `printed`, and adds them."""
    for warning in job.warnings:
        if warning not in printed:
            console.print(printable(f"warning: {warning}"), markup=False, highlight=False, soft_wrap=True)
            printed.add(warning)


def _figures(job: Job, held_out_loss: float | None) -> str:
    """Loss, held-out loss, speed and time left, as far as known."""
    parts = []
    if (loss := job.metrics.get("loss")) is not None:
        parts.append(f"loss {loss:.4f}")
    if held_out_loss is not None:
        parts.append(f"held-out {held_out_loss:.4f}")
    if speed := job.metrics.get("tokens_per_second"):
        parts.append(f"{speed:.0f} tokens/s")
    if job.progress.eta_s and not job.terminal:
        parts.append(f"{format_duration(job.progress.eta_s)} left")
    return " · ".join(parts)


def _phase(job: Job) -> str:
    if job.stop_request is not None:
        return _STOPPING.get(job.stop_request, job.stop_request)
    if job.status == "paused":
        return _paused_phase(job)
    if job.status == "queued":
        ahead = f", {job.queue_position} ahead" if job.queue_position else ""
        return "queued" + (f" to resume after step {job.checkpoint_step}" if job.checkpoint_step else "") + ahead
    attempt = f" (attempt {job.attempt})" if job.attempt > 1 else ""
    return (job.phase or job.status) + attempt


def _paused_phase(job: Job) -> str:
    """With the reason, or with the command that resumes a job that its user paused."""
    hold = job.hold or {}
    if hold.get("reason") == "user":
        return f"paused: qlora resume {job.id} puts it back into the queue"
    return f"paused: {hold.get('message', 'no reason was recorded')}"


def _show_outage(show: Show, last: Job, _error: Exception, _patience_s: float) -> None:
    show(last, "service unreachable, reconnecting")
