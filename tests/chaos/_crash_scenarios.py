"""Scenarios of crash points: the disturbed calls of the product, and the checks that must hold afterwards.

A scenario starts in a copy of a data directory from `_crash_data.prepare`. Its `act` calls the product; its `check`
opens the directory with new objects, as the next process would, continues the work, and returns the faults.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from qlora_service.actions.jobs import Submission
from qlora_service.artifacts.manifest import MANIFEST_NAME, Manifest
from qlora_service.artifacts.store import dataset_key, job_key
from qlora_service.domain.jobs import Job, JobStatus
from qlora_service.errors import ClaimLost, NotFound
from qlora_service.queue.claim import Claim, Progress
from qlora_service.queue.queue import Queue
from qlora_service.specs import parse_spec
from qlora_service.store.idempotency import Once, Replay
from qlora_service.store.tables import idempotency_keys
from qlora_service.training.checkpoint.state import to_files
from tests.chaos._crash_data import ATTEMPT, SPEC, DataDirectory, checkpoints_of, save_checkpoint, states_of
from tests.chaos._syscalls import Answer, Fault
from workers.trainer.adapter_files import publish_directory
from workers.trainer.environment import package_versions

CHECKPOINT = re.compile(r"step-\d{8}\.a\d+")
"""Name of a complete checkpoint"""


@dataclass(frozen=True)
class Scenario:
    """A call of the product, and a check of the data directory after a fault in it."""

    name: str
    start: str
    """Name of the data directory"""
    act: Callable[[DataDirectory, Answer], None]
    check: Callable[[DataDirectory, Any], list[str]]
    """From the answer of `act`, None without one, to the faults in the directory"""
    faults: tuple[Fault, ...] = tuple(Fault)


# --- submit


def submit(data: DataDirectory, answer: Answer) -> None:
    answer(data.service.jobs.submit(parse_spec(SPEC), once=_once()).job.id)
    data.database.close()


def submit_twice(data: DataDirectory, answer: Answer) -> None:
    """Submits again in the same process after a failure, which the first submission must not prevent."""
    try:
        job_id = data.service.jobs.submit(parse_spec(SPEC), once=_once()).job.id
    except Exception:
        job_id = _send_again(data)
    answer(job_id)
    data.database.close()


def check_submitted(data: DataDirectory, answer: Any) -> list[str]:
    faults = data.damage()
    jobs = data.service.jobs.list_jobs()
    if len(jobs) > 1 or (answer and [job.id for job in jobs] != [answer]):
        faults.append(f"the answer was {answer}, the jobs are {[job.id for job in jobs]}")
    if len(jobs) != _stored_answers(data):
        faults.append(f"{len(jobs)} jobs, but {_stored_answers(data)} stored answers")
    if jobs:
        faults += _submission_faults(data, jobs[0])
    repeated = _send_again(data)
    if [job.id for job in data.service.jobs.list_jobs()] != [repeated] or (jobs and repeated != jobs[0].id):
        faults.append(f"the same key made {repeated} beside {[job.id for job in jobs]}")
    return faults + _submission_faults(data, data.job)


def _once() -> Once[Submission]:
    return Once("a key", "local", "0" * 64, lambda submission: {"job": submission.job.id})


def _send_again(data: DataDirectory) -> str:
    try:
        return data.service.jobs.submit(parse_spec(SPEC), once=_once()).job.id
    except Replay as replay:
        return str(replay.answer["job"])


def _stored_answers(data: DataDirectory) -> int:
    """Number of stored answers to requests with an idempotency key."""
    with data.database.read() as connection:
        return len(connection.execute(sa.select(idempotency_keys)).all())


def _submission_faults(data: DataDirectory, job: Job) -> list[str]:
    faults = data.inconsistencies(job)
    if job.status is not JobStatus.QUEUED:
        faults.append(f"the new job is {job.status}")
    dataset = data.service.datasets.get(job.dataset_id)
    return faults + _object_faults(data, dataset_key(dataset.sha256), dataset.sha256)


def _object_faults(data: DataDirectory, key: str, sha256: str) -> list[str]:
    """The fault of an object that is missing or has another SHA-256."""
    try:
        content = b"".join(data.artifacts.read(key))
    except NotFound:
        return [f"{key} is missing"]
    return [] if hashlib.sha256(content).hexdigest() == sha256 else [f"{key} has other bytes"]


# --- checkpoint


def _checkpoint(name: str, start: str, before: int | None, step: int, metrics: str) -> Scenario:
    """Saves the state of `step`; the newest checkpoint before has step `before`."""

    def act(data: DataDirectory, answer: Answer) -> None:
        save_checkpoint(data, ATTEMPT, step, metrics)
        answer(step)

    def check(data: DataDirectory, answer: Any) -> list[str]:
        latest = checkpoints_of(data, ATTEMPT + 1).latest()
        step_and_metrics = None if latest is None else (latest[0].step, latest[1].decode())
        allowed = [(step, metrics)] if answer else [(step, metrics), before and (before, "once")]
        faults = []
        if step_and_metrics not in allowed:
            faults.append(f"the newest checkpoint is {step_and_metrics}, and could be {allowed}")
        if latest is not None and to_files(latest[0]) != states_of(data)[latest[0].step]:
            faults.append(f"the loaded state of step {latest[0].step} differs from the saved one")
        save_checkpoint(data, ATTEMPT + 1, 4)
        last = checkpoints_of(data, ATTEMPT + 2).latest()
        if last is None or last[0].step != 4:
            faults.append("the next checkpoint cannot be loaded")
        names = {path.name for path in (data.path / "checkpoints" / "job").iterdir()}
        older = names - {f"step-{4:08d}.a{ATTEMPT + 1}"}
        if len(older) != (latest is not None) or not all(CHECKPOINT.fullmatch(name) for name in older):
            faults.append(f"after the next checkpoint there are {sorted(names)}")
        return faults

    return Scenario(name, start, act, check)


# --- publish


def publish_and_succeed(data: DataDirectory, answer: Answer) -> None:
    _publish(data, ATTEMPT)
    answer(True)
    data.database.close()


def check_published(data: DataDirectory, answer: Any) -> list[str]:
    job, faults = data.job, data.damage()
    faults += data.inconsistencies(job)
    if answer and job.status is not JobStatus.SUCCEEDED:
        faults.append(f"the answer was that the job has succeeded, but it is {job.status}")
    faults += _publication_faults(data, job, ATTEMPT)
    attempt = ATTEMPT
    if job.status is JobStatus.RUNNING:
        attempt += 1
        data.queue.died(Claim(job.id, ATTEMPT), {"message": "killed"})
        data.queue.claim("another worker")
        _publish(data, attempt)
    faults += data.inconsistencies(data.job)
    published = data.service.artifacts.list_files(job.id)
    for artifact in published:
        faults += _object_faults(data, artifact.key, artifact.file.sha256)
    data.artifacts.remove_attempts(job.id, keep=attempt)
    remaining = {str(path.relative_to(data.path / "artifacts")) for path in data.path.glob("artifacts/jobs/**/*")}
    expected = {artifact.key for artifact in published} | {f"jobs/{job.id}", f"jobs/{job.id}/{attempt}"}
    if remaining != expected:
        faults.append(f"left over or missing at the end: {sorted(remaining ^ expected)}")
    return faults


def _publish(data: DataDirectory, token: int) -> None:
    job = data.job
    directory = data.path / "tmp" / f"{job.id}-{token}"
    shutil.copytree(data.prepared / "adapter", directory)
    draft = Manifest(
        job_id=job.id,
        attempt=token,
        base_model={"name": "tiny", "hub_id": None, "revision": None, "weights_sha256": "0" * 64},
        dataset={"id": job.dataset_id, "sha256": "0" * 64, "trained_on": 8, "warnings": []},
        spec=job.spec.model_dump(mode="json"),
        plan={"compute_dtype": "float32"},
        held_out={"rows": 2, "source": "held-out rows", "loss_before": 6.0, "loss_after": 5.0},
        versions=package_versions(),
        files=(),
    )
    publish_directory(directory, data.artifacts, draft)
    data.queue.succeed(Claim(job.id, token), {"attempt": token})


def _publication_faults(data: DataDirectory, job: Job, attempt: int) -> list[str]:
    """Files of the manifest, if there is one, that are missing or differ; a succeeded job without a manifest."""
    try:
        content = b"".join(data.artifacts.read(job_key(job.id, attempt, MANIFEST_NAME)))
    except NotFound:
        return ["there is no manifest"] if job.status is JobStatus.SUCCEEDED else []
    manifest = Manifest.model_validate_json(content)
    faults = []
    for file in manifest.files:
        faults += _object_faults(data, job_key(job.id, attempt, file.name), file.sha256)
    return faults


# --- finish


def _transition(name: str, start: str, after: JobStatus, act: Callable[[Queue, Claim], object]) -> Scenario:
    """A job's transition from `start`, which is a status and the name of a data directory, to `after`."""

    def move(data: DataDirectory, answer: Answer) -> None:
        act(data.queue, Claim(data.job.id, ATTEMPT))
        answer(True)
        data.database.close()

    def check(data: DataDirectory, answer: Any) -> list[str]:
        job = data.job
        faults, history = data.damage() + data.inconsistencies(job), _HISTORIES[start]
        if data.statuses(job) not in ([[*history, after]] if answer else [history, [*history, after]]):
            faults.append(f"the job's statuses are {data.statuses(job)}")
        try:
            repeated = act(data.queue, Claim(job.id, ATTEMPT)) is not None or start != "queued"
        except ClaimLost:
            repeated = False
        if repeated is not (job.status == start):
            faults.append(f"from {job.status}, {name} {'was done again' if repeated else 'is not possible any more'}")
        if data.statuses(job) != [*history, after]:
            faults.append(f"the job's statuses in the end are {data.statuses(job)}")
        return faults + data.inconsistencies(data.job)

    return Scenario(name, start, move, check)


_HISTORIES: dict[str, list[str]] = {"queued": ["queued"], "running": ["queued", "running"]}


def report(data: DataDirectory, answer: Answer) -> None:
    metrics = ("metrics", {"step": 3, "loss": 1.0})
    data.queue.report(Claim(data.job.id, ATTEMPT), Progress(step=3, checkpoint_step=3), metrics)
    answer(3)
    data.database.close()


def check_reported(data: DataDirectory, answer: Any) -> list[str]:
    job, faults = data.job, data.damage()
    steps = [record["step"] for record in data.service.jobs.metrics(job.id)]
    if (job.step, job.checkpoint_step, steps) not in [(3, 3, [3]), *([] if answer else [(0, 0, [])])]:
        faults.append(f"step {job.step}, checkpoint of step {job.checkpoint_step}, metrics of steps {steps}")
    return faults + data.inconsistencies(job)


SCENARIOS = (
    Scenario("submit", "empty", submit, check_submitted),
    Scenario("submit twice", "empty", submit_twice, check_submitted, (Fault.ENOSPC, Fault.EIO, Fault.FULL_DISK)),
    _checkpoint("first checkpoint", "empty", None, 1, "first"),
    _checkpoint("checkpoint", "checkpointed", 2, 3, "later"),
    _checkpoint("checkpoint of the same step", "checkpointed", 2, 2, "again"),
    Scenario("publish", "running", publish_and_succeed, check_published),
    _transition("claim", "queued", JobStatus.RUNNING, lambda queue, _: queue.claim("a worker")),
    Scenario("report", "running", report, check_reported),
    _transition("succeed", "running", JobStatus.SUCCEEDED, lambda queue, claim: queue.succeed(claim, {})),
    _transition("fail", "running", JobStatus.FAILED, lambda queue, claim: queue.fail(claim, {"message": "it"})),
    _transition("pause", "running", JobStatus.PAUSED, lambda queue, claim: queue.pause(claim, {"reason": "user"})),
    _transition("release", "running", JobStatus.QUEUED, lambda queue, claim: queue.release(claim, "stopped")),
    _transition("died", "running", JobStatus.QUEUED, lambda queue, claim: queue.died(claim, {"message": "it"})),
)
