"""Property test of the queue: random sequences of submits, claims, reports, requests, crashes and lease expiries."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qlora_service.domain.jobs import TRANSITIONS, HoldReason, Job, JobEvent, JobStatus, StopRequest
from qlora_service.errors import ClaimLost, Conflict
from qlora_service.queue.claim import Claim, Progress
from qlora_service.queue.queue import Queue
from qlora_service.queue.requests import request_cancel, request_pause, request_resume
from qlora_service.store.jobs import events_after, get_job
from tests.control_plane import LEASE_S, JobRequest, SteppedClock, add_job, read_job, send_request, sqlite_database

pytestmark = pytest.mark.slow

MAX_DEATHS = 3
MAX_RUNNING = 2
MAX_JOBS = 4
WORKERS = ["a", "b", "c"]
PICK = st.integers(0, 11)
ENDS = {
    "succeed": lambda queue, claim: queue.succeed(claim, {"attempt": claim.token}),
    "fail": lambda queue, claim: queue.fail(claim, {"code": "job_failed", "message": "it failed"}),
    "cancelled": lambda queue, claim: queue.cancelled(claim),
    "pause": lambda queue, claim: queue.pause(
        claim, {"reason": HoldReason.DISK_FULL, "message": "full", "needs_bytes": 10}
    ),
    "release": lambda queue, claim: queue.release(claim, "the worker was stopped"),
    "died": lambda queue, claim: queue.died(claim, {"message": "killed"}),
}


def _report(queue: Queue, claim: Claim) -> None:
    queue.report(claim, Progress(step=1), ("metrics", {"step": 1, "attempt": claim.token}))


class QueueStates(RuleBasedStateMachine):
    """A model of claims and leases, compared with the real queue on a real file."""

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory()
        self.database = sqlite_database(Path(self._directory.name))
        self.clock = SteppedClock()
        self.queue = Queue(
            self.database,
            lease_s=LEASE_S,
            clock=self.clock,
            leases=self.clock.lease_clock,
            max_running=MAX_RUNNING,
            max_deaths=MAX_DEATHS,
        )
        self.owners: dict[str, int] = {}
        """Token of each running job's claim, by job id"""
        self.expiry: dict[str, float] = {}
        """End of each running job's lease"""
        self.ended: dict[str, dict[str, Any]] = {}
        """Fields of each ended job, when it was first seen"""
        self.ids: list[str] = []
        self.lost: list[Claim] = []
        """Claims that are no longer valid"""
        self.checkpoint: dict[str, int] = {}
        """Step of each job's last checkpoint"""

    def teardown(self) -> None:
        self.database.close()
        self._directory.cleanup()

    def _now(self) -> float:
        return self.clock.lease_clock(None)[1]

    def _end_claim(self, job_id: str) -> None:
        self.lost.append(Claim(job_id, self.owners.pop(job_id)))
        del self.expiry[job_id]

    def _valid_claim(self, pick: int) -> Claim:
        claims = sorted(self.owners.items())
        return Claim(*claims[pick % len(claims)])

    @precondition(lambda self: len(self.ids) < MAX_JOBS)
    @rule(priority=st.integers(0, 3))
    def submit(self, priority: int) -> None:
        job_id = add_job(self.database, priority=priority)
        self.ids.append(job_id)
        self.checkpoint[job_id] = 0

    @rule(worker=st.sampled_from(WORKERS))
    def claim(self, worker: str) -> None:
        queued = [job for job in map(self._job, self.ids) if job.status is JobStatus.QUEUED]
        claimed = self.queue.claim(worker)
        if not queued or len(self.owners) >= MAX_RUNNING:
            assert claimed is None
            return
        assert claimed is not None
        claim, job = claimed
        assert claim.job_id == min(queued, key=lambda one: (-one.spec.priority, one.id)).id
        assert job.step == self.checkpoint[job.id]
        self.owners[claim.job_id] = claim.token
        self.expiry[claim.job_id] = self._now() + LEASE_S

    @precondition(lambda self: self.lost)
    @rule(pick=PICK, method=st.sampled_from([*sorted(ENDS), "report", "renew"]))
    def write_with_a_lost_claim(self, pick: int, method: str) -> None:
        claim = self.lost[-1 - pick % len(self.lost)]
        write = {**ENDS, "report": _report, "renew": lambda queue, claim: queue.renew(claim)}[method]
        with pytest.raises(ClaimLost):
            write(self.queue, claim)

    @precondition(lambda self: self.owners)
    @rule(pick=PICK, step=st.integers(1, 9), saves=st.booleans())
    def report(self, pick: int, step: int, saves: bool) -> None:
        claim = self._valid_claim(pick)
        saved = max(step, self.checkpoint[claim.job_id]) if saves else None
        stop_request = self.queue.report(
            claim, Progress(step=step, checkpoint_step=saved), ("metrics", {"step": step, "attempt": claim.token})
        )
        assert stop_request == self._job(claim.job_id).stop_request
        self.checkpoint[claim.job_id] = saved or self.checkpoint[claim.job_id]
        self.expiry[claim.job_id] = self._now() + LEASE_S

    @precondition(lambda self: self.owners)
    @rule(pick=PICK, method=st.sampled_from(sorted(ENDS)))
    def end(self, pick: int, method: str) -> None:
        claim = self._valid_claim(pick)
        before = self._job(claim.job_id)
        ENDS[method](self.queue, claim)
        self._end_claim(claim.job_id)
        job = self._job(claim.job_id)
        if method in ("pause", "release", "died") and before.stop_request is StopRequest.CANCEL:
            assert job.status is JobStatus.CANCELLED
        elif method in ("release", "died") and before.stop_request is StopRequest.PAUSE:
            assert job.status is JobStatus.PAUSED
        elif method == "died":
            too_often = len(before.deaths) + 1 >= MAX_DEATHS
            assert job.status is (JobStatus.FAILED if too_often else JobStatus.QUEUED)
        else:
            assert job.status.value == {
                "succeed": "succeeded", "fail": "failed", "cancelled": "cancelled", "pause": "paused",
                "release": "queued",
            }[method]  # fmt: skip

    @precondition(lambda self: self.ids)
    @rule(pick=PICK, action=st.sampled_from([request_cancel, request_pause, request_resume]))
    def request(self, pick: int, action: JobRequest) -> None:
        job_id = self.ids[pick % len(self.ids)]
        before = self._job(job_id)
        try:
            job = send_request(self.database, action, job_id)
        except Conflict:
            assert before.status.terminal or before.stop_request is StopRequest.CANCEL
            return
        if action is request_cancel:
            assert job.status is JobStatus.CANCELLED or job.stop_request is StopRequest.CANCEL
        elif action is request_pause:
            assert job.status is JobStatus.PAUSED or job.stop_request is StopRequest.PAUSE
        else:
            assert job.status in (JobStatus.QUEUED, JobStatus.RUNNING)
            assert job.stop_request is not StopRequest.PAUSE

    @rule(seconds=st.sampled_from([1.0, LEASE_S / 2, LEASE_S + 1]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def requeue_lost(self) -> None:
        expired = {job_id for job_id, until in self.expiry.items() if until < self._now()}
        assert set(self.queue.requeue_lost()) == expired
        for job_id in expired:
            self._end_claim(job_id)

    @rule(worker=st.sampled_from(WORKERS))
    def worker_dies(self, worker: str) -> None:
        for job_id in self.queue.requeue_of(worker):
            assert job_id in self.owners
            self._end_claim(job_id)

    @rule()
    def preempt(self) -> None:
        victim = self.queue.preempt(WORKERS)
        if victim is not None:
            priority = self._job(victim).spec.priority
            queued = [job for job in map(self._job, self.ids) if job.status is JobStatus.QUEUED]
            assert max(job.spec.priority for job in queued) > priority

    @rule(free_bytes=st.sampled_from([0, 10]))
    def resume_held(self, free_bytes: int) -> None:
        for job_id in self.queue.resume_held(free_bytes):
            assert free_bytes >= 10
            assert self._job(job_id).status is JobStatus.QUEUED

    @invariant()
    def jobs_and_events_match_the_model(self) -> None:
        with self.database.read() as connection:
            jobs = [get_job(connection, job_id) for job_id in self.ids]
            events = [events_after(connection, job_id) for job_id in self.ids]
        self._check_running_jobs(jobs)
        for job, job_events in zip(jobs, events, strict=True):
            self._check_end(job)
            self._check_history(job, job_events)

    def _check_running_jobs(self, jobs: list[Job]) -> None:
        """Running jobs have the token of their latest claim."""
        running = {job.id: job.attempt for job in jobs if job.status is JobStatus.RUNNING}
        assert running == self.owners
        assert len(running) <= MAX_RUNNING

    def _check_end(self, job: Job) -> None:
        """An ended job does not change any more."""
        if job.status.terminal:
            assert vars(job) == self.ended.setdefault(job.id, dict(vars(job)))
            assert job.finished_at is not None
            assert job.stop_request is None
        else:
            assert job.id not in self.ended
            assert job.finished_at is None
        assert (job.hold is not None) == (job.status is JobStatus.PAUSED)
        assert job.checkpoint_step == self.checkpoint[job.id]

    def _check_history(self, job: Job, events: list[JobEvent]) -> None:
        """The events' statuses follow the state machine, and attempts only grow."""
        history = [JobStatus(event.data["status"]) for event in events if event.type == "status"]
        assert history[0] is JobStatus.QUEUED
        assert history[-1] is job.status
        assert all(after in TRANSITIONS[before] for before, after in itertools.pairwise(history))
        attempts = [event.data["attempt"] for event in events if "attempt" in event.data]
        assert attempts == sorted(attempts)

    def _job(self, job_id: str) -> Any:
        return read_job(self.database, job_id)


TestQueueStates = QueueStates.TestCase
TestQueueStates.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
