"""What is disturbed at every system call, and what must hold afterwards, whatever happened.

A scenario starts from a copy of a data directory of `_crash_data.prepare`. Its `act` is the product's own function;
`check` looks at what is left with new objects, as the next process would, goes on from there, and says what is wrong.
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
from qlora_service.artifacts.manifest import NAME as MANIFEST
from qlora_service.artifacts.manifest import Manifest
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

WHOLE = re.compile(r"step-\d{8}\.a\d+")


@dataclass(frozen=True)
class Scenario:
    """`start` is the name of the data directory that it begins with."""

    name: str
    start: str
    act: Callable[[DataDirectory, Answer], None]
    check: Callable[[DataDirectory, Any], list[str]]
    """Takes what `act` answered, None if nothing; what is wrong"""
    faults: tuple[Fault, ...] = tuple(Fault)


# --- submit


def submit(data: DataDirectory, answer: Answer) -> None:
    answer(data.service.jobs.submit(parse_spec(SPEC), once=_once()).job.id)
    data.database.close()


def submit_twice(data: DataDirectory, answer: Answer) -> None:
    """By the same process: what failed must not stay in its way."""
    try:
        job_id = data.service.jobs.submit(parse_spec(SPEC), once=_once()).job.id
    except Exception:
        job_id = _send_again(data)
    answer(job_id)
    data.database.close()


def check_submitted(data: DataDirectory, answer: Any) -> list[str]:
    wrong = data.damage()
    jobs = data.service.jobs.list_jobs()
    if len(jobs) > 1 or (answer and [job.id for job in jobs] != [answer]):
        wrong.append(f"the answer was {answer}, the jobs are {[job.id for job in jobs]}")
    if len(jobs) != _kept_answers(data):
        wrong.append(f"{len(jobs)} jobs, but {_kept_answers(data)} kept answers")
    if jobs:
        wrong += _broken_submission(data, jobs[0])
    again = _send_again(data)
    if [job.id for job in data.service.jobs.list_jobs()] != [again] or (jobs and again != jobs[0].id):
        wrong.append(f"the same key made {again} beside {[job.id for job in jobs]}")
    return wrong + _broken_submission(data, data.job)


def _once() -> Once[Submission]:
    return Once("a key", "local", "0" * 64, lambda submission: {"job": submission.job.id})


def _send_again(data: DataDirectory) -> str:
    try:
        return data.service.jobs.submit(parse_spec(SPEC), once=_once()).job.id
    except Replay as replay:
        return str(replay.answer["job"])


def _kept_answers(data: DataDirectory) -> int:
    with data.database.read() as connection:
        return len(connection.execute(sa.select(idempotency_keys)).all())


def _broken_submission(data: DataDirectory, job: Job) -> list[str]:
    wrong = data.misfits(job)
    if job.status is not JobStatus.QUEUED:
        wrong.append(f"the new job is {job.status}")
    dataset = data.service.datasets.get(job.dataset_id)
    return wrong + _other_bytes(data, dataset_key(dataset.sha256), dataset.sha256)


def _other_bytes(data: DataDirectory, key: str, sha256: str) -> list[str]:
    try:
        content = b"".join(data.artifacts.read(key))
    except NotFound:
        return [f"{key} is not there"]
    return [] if hashlib.sha256(content).hexdigest() == sha256 else [f"{key} has other bytes"]


# --- checkpoint


def _checkpoint(name: str, start: str, before: int | None, step: int, metrics: str) -> Scenario:
    """Saving the state of `step`, where the newest checkpoint has `before`."""

    def act(data: DataDirectory, answer: Answer) -> None:
        save_checkpoint(data, ATTEMPT, step, metrics)
        answer(step)

    def check(data: DataDirectory, answer: Any) -> list[str]:
        found = checkpoints_of(data, ATTEMPT + 1).latest()
        has = None if found is None else (found[0].step, found[1].decode())
        allowed = [(step, metrics)] if answer else [(step, metrics), before and (before, "once")]
        wrong = [] if has in allowed else [f"the newest checkpoint is {has}, and could be {allowed}"]
        if found is not None and to_files(found[0]) != states_of(data)[found[0].step]:
            wrong.append(f"the state of step {found[0].step} came back as another")
        save_checkpoint(data, ATTEMPT + 1, 4)
        last = checkpoints_of(data, ATTEMPT + 2).latest()
        if last is None or last[0].step != 4:
            wrong.append("the next checkpoint cannot be loaded")
        names = {path.name for path in (data.path / "checkpoints" / "job").iterdir()}
        before_it = names - {f"step-{4:08d}.a{ATTEMPT + 1}"}
        if len(before_it) != (found is not None) or not all(WHOLE.fullmatch(name) for name in before_it):
            wrong.append(f"after the next checkpoint there are {sorted(names)}")
        return wrong

    return Scenario(name, start, act, check)


# --- publish


def publish_and_succeed(data: DataDirectory, answer: Answer) -> None:
    _publish(data, ATTEMPT)
    answer(True)
    data.database.close()


def check_published(data: DataDirectory, answer: Any) -> list[str]:
    job, wrong = data.job, data.damage()
    wrong += data.misfits(job)
    if answer and job.status is not JobStatus.SUCCEEDED:
        wrong.append(f"it was told that the job has succeeded, but it is {job.status}")
    wrong += _broken_publication(data, job, ATTEMPT)
    attempt = ATTEMPT
    if job.status is JobStatus.RUNNING:
        attempt += 1
        data.queue.died(Claim(job.id, ATTEMPT), {"message": "killed"})
        data.queue.claim("another worker")
        _publish(data, attempt)
    wrong += data.misfits(data.job)
    published = data.service.artifacts.list_files(job.id)
    for artifact in published:
        wrong += _other_bytes(data, artifact.key, artifact.file.sha256)
    data.artifacts.remove_attempts(job.id, keep=attempt)
    left = {str(path.relative_to(data.path / "artifacts")) for path in data.path.glob("artifacts/jobs/**/*")}
    expected = {artifact.key for artifact in published} | {f"jobs/{job.id}", f"jobs/{job.id}/{attempt}"}
    return wrong if left == expected else [*wrong, f"left or missing at the end: {sorted(left ^ expected)}"]


def _publish(data: DataDirectory, token: int) -> None:
    job = data.job
    directory = data.path / "tmp" / f"{job.id}-{token}"
    shutil.copytree(data.prepared / "adapter", directory)
    draft = Manifest(
        job_id=job.id,
        attempt=token,
        base_model={"name": "tiny", "hub_id": None, "revision": None, "weights_sha256": "0" * 64},
        dataset={"id": job.dataset_id, "sha256": "0" * 64, "trained_on": 8},
        spec=job.spec.model_dump(mode="json"),
        plan={"compute_dtype": "float32"},
        held_out={"rows": 2, "source": "held-out rows", "loss_before": 6.0, "loss_after": 5.0},
        versions=package_versions(),
        files=(),
    )
    publish_directory(directory, data.artifacts, draft)
    data.queue.succeed(Claim(job.id, token), {"attempt": token})


def _broken_publication(data: DataDirectory, job: Job, attempt: int) -> list[str]:
    """What a manifest that is there names, and is not so."""
    try:
        content = b"".join(data.artifacts.read(job_key(job.id, attempt, MANIFEST)))
    except NotFound:
        return ["there is no manifest"] if job.status is JobStatus.SUCCEEDED else []
    manifest = Manifest.model_validate_json(content)
    wrong = []
    for file in manifest.files:
        wrong += _other_bytes(data, job_key(job.id, attempt, file.name), file.sha256)
    return wrong


# --- finish


def _transition(name: str, start: str, after: JobStatus, act: Callable[[Queue, Claim], object]) -> Scenario:
    """A job's way from `start`, a status and the name of a data directory, to `after`."""

    def move(data: DataDirectory, answer: Answer) -> None:
        act(data.queue, Claim(data.job.id, ATTEMPT))
        answer(True)
        data.database.close()

    def check(data: DataDirectory, answer: Any) -> list[str]:
        job = data.job
        wrong, past = data.damage() + data.misfits(job), _PAST[start]
        if data.statuses(job) not in ([[*past, after]] if answer else [past, [*past, after]]):
            wrong.append(f"the job went through {data.statuses(job)}")
        try:
            repeated = act(data.queue, Claim(job.id, ATTEMPT)) is not None or start != "queued"
        except ClaimLost:
            repeated = False
        if repeated is not (job.status == start):
            wrong.append(f"from {job.status}, {name} {'was done again' if repeated else 'is not possible any more'}")
        if data.statuses(job) != [*past, after]:
            wrong.append(f"in the end the job went through {data.statuses(job)}")
        return wrong + data.misfits(data.job)

    return Scenario(name, start, move, check)


_PAST: dict[str, list[str]] = {"queued": ["queued"], "running": ["queued", "running"]}


def report(data: DataDirectory, answer: Answer) -> None:
    metrics = ("metrics", {"step": 3, "loss": 1.0})
    data.queue.report(Claim(data.job.id, ATTEMPT), Progress(step=3, checkpoint_step=3), metrics)
    answer(3)
    data.database.close()


def check_reported(data: DataDirectory, answer: Any) -> list[str]:
    job, wrong = data.job, data.damage()
    told = [record["step"] for record in data.service.jobs.metrics(job.id)]
    if (job.step, job.checkpoint_step, told) not in [(3, 3, [3]), *([] if answer else [(0, 0, [])])]:
        wrong.append(f"step {job.step}, checkpoint of step {job.checkpoint_step}, metrics of steps {told}")
    return wrong + data.misfits(job)


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
