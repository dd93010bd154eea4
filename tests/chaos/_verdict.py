"""Checks that disturbed jobs ended like an undisturbed one: once, complete, with the same bytes and no leftovers."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_service.artifacts.manifest import MANIFEST_NAME, describe_file
from qlora_service.domain.jobs import JobStatus
from tests.workspace import Workspace, processes_on


@dataclass
class Verdict:
    """Faults: job ids, or sentences that begin with one."""

    lost: list[str] = field(default_factory=list)
    """Jobs that do not exist or have not succeeded"""
    published_twice: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Every other difference"""


def check_jobs(workspace: Workspace, reference: str, posted: Sequence[str], steps: int) -> Verdict:
    """Differences between the `posted` jobs of `steps` steps and `reference`, an undisturbed job."""
    verdict = Verdict()
    sha256 = workspace.adapter_sha256(reference)
    evaluated = _steps(workspace.service.jobs.metrics(reference), "eval_loss")
    existing = job_ids(workspace)
    for job_id in posted:
        if job_id not in existing or workspace.service.jobs.get(job_id).status is not JobStatus.SUCCEEDED:
            verdict.lost.append(job_id)
            continue
        if len(_terminal_statuses(workspace, job_id)) != 1 or len(_manifests(workspace, job_id)) != 1:
            verdict.published_twice.append(job_id)
        if workspace.adapter_sha256(job_id) != sha256:
            verdict.wrong.append(f"{job_id}: its adapter differs from the undisturbed job's")
        verdict.wrong += [f"{job_id}: {fault}" for fault in _faults(workspace, job_id, steps, evaluated)]
    with sqlite3.connect(workspace.settings.data_dir / "state.db") as database:
        (integrity,) = database.execute("PRAGMA integrity_check").fetchone()
    database.close()
    if integrity != "ok":
        verdict.wrong.append(f"the database: {integrity}")
    return verdict


def leftovers(workspace: Workspace, limit_s: float) -> list[str]:
    """Scratch directories and checkpoints of jobs that still exist after `limit_s` seconds with an idle service."""

    def find() -> list[str]:
        directories = (workspace.settings.tmp_dir, workspace.settings.checkpoint_dir)
        # Other scratch files belong to the running API.
        return [f"left over: {path}" for directory in directories for path in directory.glob("job_*")]

    return _remaining(find, limit_s)


def orphans(data_dir: Path, limit_s: float) -> list[str]:
    """Processes of a stopped service that still run after `limit_s` seconds."""
    return _remaining(lambda: [f"orphan {pid}: {what}" for pid, what in processes_on(data_dir).items()], limit_s)


def job_ids(workspace: Workspace) -> set[str]:
    """The ids of all jobs."""
    with sqlite3.connect(workspace.settings.data_dir / "state.db") as database:
        ids = {row[0] for row in database.execute("SELECT id FROM jobs")}
    database.close()
    return ids


def _remaining(find: Callable[[], list[str]], limit_s: float) -> list[str]:
    """The result of `find` once it is empty, or after `limit_s` seconds."""
    deadline = time.monotonic() + limit_s
    while (remaining := find()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return remaining


def _terminal_statuses(workspace: Workspace, job_id: str) -> list[str]:
    """The terminal statuses among a job's events."""
    events = workspace.service.jobs.events(job_id)
    return [e.data["status"] for e in events if e.type == "status" and JobStatus(e.data["status"]).terminal]


def _manifests(workspace: Workspace, job_id: str) -> list[Path]:
    return list((workspace.settings.data_dir / "artifacts" / "jobs" / job_id).glob(f"*/{MANIFEST_NAME}"))


def _faults(workspace: Workspace, job_id: str, steps: int, evaluated: list[int]) -> list[str]:
    """Faults of the events, artifacts and metrics of a succeeded job.

    The job should have `steps` steps, and evaluations after the steps `evaluated`.
    """
    faults = []
    events = workspace.service.jobs.events(job_id)
    if events[-1].type != "status" or events[-1].data["status"] != JobStatus.SUCCEEDED:
        faults.append("it has events after its end")
    manifest = workspace.service.artifacts.manifest(job_id)
    directory = workspace.settings.data_dir / "artifacts" / "jobs" / job_id
    attempts = sorted(path.name for path in directory.iterdir())
    if attempts != [str(manifest.attempt)]:
        faults.append(f"there are artifacts of the attempts {attempts} instead of only {manifest.attempt}")
    published = directory / str(manifest.attempt)
    names = {path.name for path in published.iterdir()}
    if names != {file.name for file in manifest.files} | {MANIFEST_NAME}:
        faults.append(f"the artifacts are not those of the manifest: {sorted(names)}")
    faults += [
        f"size or SHA-256 of {file.name} differs from the manifest"
        for file in manifest.files
        if file.name in names and describe_file(published / file.name) != file
    ]
    records = [json.loads(line) for line in (published / "metrics.jsonl").read_text().splitlines()]
    for name, metrics in {"metrics.jsonl": records, "GET /metrics": workspace.service.jobs.metrics(job_id)}.items():
        if _steps(metrics, "loss") != list(range(1, steps + 1)):
            faults.append(f"{name} has the steps {_steps(metrics, 'loss')}")
        if _steps(metrics, "eval_loss") != evaluated:
            faults.append(f"{name} has evaluations after the steps {_steps(metrics, 'eval_loss')}")
    return faults


def _steps(records: Sequence[dict[str, Any]], metric: str) -> list[int]:
    """The steps of the records with the metric."""
    return [record["step"] for record in records if metric in record]
