"""Whether jobs that were disturbed ended as if they had not been: once, whole, with the same bytes, leaving nothing."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_service.artifacts.manifest import NAME as MANIFEST
from qlora_service.artifacts.manifest import describe_file
from qlora_service.domain.jobs import JobStatus
from tests.workspace import Workspace, processes_on


@dataclass
class Verdict:
    """What is not as it should be; job ids, or sentences that begin with one."""

    lost: list[str] = field(default_factory=list)
    published_twice: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def judge(workspace: Workspace, reference: str, posted: Sequence[str], steps: int) -> Verdict:
    """What is wrong with the `posted` jobs, which should have ended as `reference` did, an undisturbed one."""
    verdict = Verdict()
    sha256 = workspace.adapter_sha256(reference)
    evaluated = _steps(workspace.service.jobs.metrics(reference), "eval_loss")
    known = job_ids(workspace)
    for job_id in posted:
        if job_id not in known or workspace.service.jobs.get(job_id).status is not JobStatus.SUCCEEDED:
            verdict.lost.append(job_id)
            continue
        if len(_ends(workspace, job_id)) != 1 or len(_manifests(workspace, job_id)) != 1:
            verdict.published_twice.append(job_id)
        if workspace.adapter_sha256(job_id) != sha256:
            verdict.wrong.append(f"{job_id}: another adapter than the undisturbed job's")
        verdict.wrong += [f"{job_id}: {fault}" for fault in _faults(workspace, job_id, steps, evaluated)]
    with sqlite3.connect(workspace.settings.data_dir / "state.db") as database:
        (integrity,) = database.execute("PRAGMA integrity_check").fetchone()
    database.close()
    if integrity != "ok":
        verdict.wrong.append(f"the database: {integrity}")
    return verdict


def leftovers(workspace: Workspace, limit_s: float) -> list[str]:
    """Scratch and checkpoints that are still there after `limit_s` seconds, while service and worker run idle."""

    def found() -> list[str]:
        directories = (workspace.settings.tmp_dir, workspace.settings.checkpoint_dir)
        # What the running API has there is its own.
        return [f"left over: {path}" for directory in directories for path in directory.glob("job_*")]

    return _when_empty(found, limit_s)


def orphans(data_dir: Path, limit_s: float) -> list[str]:
    """Processes of a stopped service that are still there after `limit_s` seconds."""
    return _when_empty(lambda: [f"orphan {pid}: {what}" for pid, what in processes_on(data_dir).items()], limit_s)


def _when_empty(found: Callable[[], list[str]], limit_s: float) -> list[str]:
    deadline = time.monotonic() + limit_s
    while (left := found()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def job_ids(workspace: Workspace) -> set[str]:
    """All jobs that there are."""
    with sqlite3.connect(workspace.settings.data_dir / "state.db") as database:
        ids = {row[0] for row in database.execute("SELECT id FROM jobs")}
    database.close()
    return ids


def _ends(workspace: Workspace, job_id: str) -> list[str]:
    """The terminal ones of a job's status events."""
    events = workspace.service.jobs.events(job_id)
    return [e.data["status"] for e in events if e.type == "status" and JobStatus(e.data["status"]).terminal]


def _manifests(workspace: Workspace, job_id: str) -> list[Path]:
    return list((workspace.settings.data_dir / "artifacts" / "jobs" / job_id).glob(f"*/{MANIFEST}"))


def _faults(workspace: Workspace, job_id: str, steps: int, evaluated: list[int]) -> list[str]:
    """What is wrong with a job that succeeded, beside its adapter's weights and how often it did.

    It should have done `steps` steps, and been evaluated after those of `evaluated`.
    """
    faults = []
    events = workspace.service.jobs.events(job_id)
    if events[-1].type != "status" or events[-1].data["status"] != JobStatus.SUCCEEDED:
        faults.append("something happened after its end")
    manifest = workspace.service.artifacts.manifest(job_id)
    directory = workspace.settings.data_dir / "artifacts" / "jobs" / job_id
    attempts = sorted(path.name for path in directory.iterdir())
    if attempts != [str(manifest.attempt)]:
        faults.append(f"there are artifacts of the attempts {attempts} instead of {manifest.attempt} alone")
    published = directory / str(manifest.attempt)
    names = {path.name for path in published.iterdir()}
    if names != {file.name for file in manifest.files} | {MANIFEST}:
        faults.append(f"there are artifacts that the manifest does not name, or none that it does: {sorted(names)}")
    faults += [
        f"{file.name} is not what the manifest says"
        for file in manifest.files
        if file.name in names and describe_file(published / file.name) != file
    ]
    records = [json.loads(line) for line in (published / "metrics.jsonl").read_text().splitlines()]
    for name, found in {"metrics.jsonl": records, "GET /metrics": workspace.service.jobs.metrics(job_id)}.items():
        if _steps(found, "loss") != list(range(1, steps + 1)):
            faults.append(f"{name} has the steps {_steps(found, 'loss')}")
        if _steps(found, "eval_loss") != evaluated:
            faults.append(f"{name} has evaluations after the steps {_steps(found, 'eval_loss')}")
    return faults


def _steps(records: Sequence[dict[str, Any]], kind: str) -> list[int]:
    return [record["step"] for record in records if kind in record]
