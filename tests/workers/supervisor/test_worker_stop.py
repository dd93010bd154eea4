"""Stopped and killed workers: their trainers end, and the next worker takes over slot and jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from qlora_service.domain.jobs import JobStatus
from tests.workers.supervisor._jobs import ENDLESS, stopped_trainer
from tests.workspace import IGNORING_SIGINT, ROOT, Workspace, ignored_signals, no_trainer_within, trainer_pids
from workers.supervisor.slot_lock import SlotLock

# Another thread takes the signal, as if it arrived just before the main thread blocks: nothing wakes the main thread.
SIGNAL_IN_ANOTHER_THREAD = """
import signal, threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
from workers.__main__ import main
main()
"""


def test_a_worker_stops_whichever_thread_receives_the_signal(tmp_path: Path) -> None:
    environment = os.environ | {"QLORA_DATA_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SIGNAL_IN_ANOTHER_THREAD]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as worker:
        try:
            assert worker.stderr is not None
            assert any("supervisor_ready" in line for line in worker.stderr)
            worker.terminate()
            worker.wait(10)
        finally:
            worker.kill()


def test_a_worker_that_ignores_ctrl_c_stops_its_trainer_at_sigterm(workspace: Workspace) -> None:
    job_id = workspace.submit(**ENDLESS)
    with workspace.start_worker(within=IGNORING_SIGINT) as worker:
        try:
            workspace.wait(job_id, lambda job: job.step >= 1)
            assert signal.SIGTERM not in ignored_signals(trainer_pids(job_id)[0])
            worker.send_signal(signal.SIGINT)
            time.sleep(0.5)
            assert worker.poll() is None
            worker.terminate()
            assert worker.wait(15) == 0
            assert not trainer_pids(job_id)
        finally:
            worker.kill()


def test_a_stopped_worker_loses_no_completed_step(workspace: Workspace) -> None:
    uninterrupted, stopped = workspace.submit(max_steps=120), workspace.submit(max_steps=120)
    with workspace.worker() as worker:
        workspace.wait_for_end(uninterrupted)
        workspace.wait(stopped, lambda job: job.step >= 5)
        worker.send_signal(signal.SIGTERM)
        stopped_at = time.monotonic()
        assert worker.wait(15) == 0
        assert time.monotonic() - stopped_at < 8
        assert not trainer_pids(stopped)
    job = workspace.service.jobs.get(stopped)
    steps = [record["step"] for record in workspace.service.jobs.metrics(stopped) if "loss" in record]
    assert (job.status, job.attempt, job.deaths) == (JobStatus.QUEUED, 1, [])
    assert job.checkpoint_step == steps[-1] >= 5
    with workspace.worker():
        workspace.wait_for_end(stopped)
    assert workspace.adapter_sha256(stopped) == workspace.adapter_sha256(uninterrupted)
    metrics = [record["step"] for record in workspace.service.jobs.metrics(stopped) if "loss" in record]
    assert metrics == list(range(1, 121))


def test_the_trainer_of_a_killed_worker_exits_and_the_next_worker_resumes_the_job_at_once(workspace: Workspace) -> None:
    job_id = workspace.submit(max_steps=100)
    with workspace.worker(QLORA_CHECKPOINT_S="0") as worker:
        workspace.wait(job_id, lambda job: job.checkpoint_step >= 3)
        worker.kill()
        worker.wait()
        assert no_trainer_within(job_id, 5)
    started_at = time.monotonic()
    with workspace.worker():
        workspace.wait(job_id, lambda job: job.attempt == 2, limit_s=10)  # long before the lease expires
        assert time.monotonic() - started_at < 8
        job = workspace.wait_for_end(job_id)
    assert (job.status, job.attempt) == (JobStatus.SUCCEEDED, 2)
    steps = [record["step"] for record in workspace.service.jobs.metrics(job_id) if "loss" in record]
    assert steps == list(range(1, 101))


def test_a_second_worker_waits_for_the_slot(workspace: Workspace) -> None:
    first_job, second_job = workspace.submit(**ENDLESS), workspace.submit(**ENDLESS)
    with workspace.worker() as first:
        workspace.wait(first_job, lambda job: job.step >= 1)
        trainers = trainer_pids(first_job)
        with workspace.worker():
            time.sleep(3)
            assert workspace.service.jobs.get(second_job).status is JobStatus.QUEUED
            assert trainer_pids(first_job) == trainers
            first.kill()
            first.wait()
            # Either job may be claimed first: one trainer runs again, on the free slot.
            workspace.wait(first_job, lambda job: job.attempt == 2 and job.phase != "starting")
            assert len(trainer_pids(first_job) + trainer_pids(second_job)) == 1


def test_the_slot_of_a_killed_worker_is_taken_over_after_its_stopped_trainer_is_killed(
    workspace: Workspace,
) -> None:
    job_id = workspace.submit(**ENDLESS)
    with workspace.worker() as first:
        workspace.wait(job_id, lambda job: job.step >= 1)
        with stopped_trainer(workspace, job_id) as stopped:
            first.kill()
            first.wait()
            lock = SlotLock(workspace.settings.resolved_lock_dir, "cpu-0")
            assert not lock.acquire()
            assert lock.other_holders() == [stopped]
            lock.close()
            with workspace.worker():
                workspace.wait(job_id, lambda job: job.attempt == 2, limit_s=25)
                assert stopped not in trainer_pids(job_id)


def test_scratch_of_a_killed_supervisor_is_reaped(workspace: Workspace) -> None:
    leftover = workspace.settings.tmp_dir / "job_0000-1"
    leftover.mkdir()
    (leftover / "rows.arrow").write_text("left behind")
    ended = workspace.submit()
    workspace.service.jobs.cancel(ended)
    checkpoint = workspace.settings.checkpoint_dir / ended / "step-00000001.a1"
    checkpoint.mkdir(parents=True)
    job_id = workspace.submit()
    with workspace.worker():
        assert workspace.wait_for_end(job_id).status is JobStatus.SUCCEEDED
    assert not leftover.exists()
    assert not checkpoint.parent.exists()


def test_a_hanging_trainer_does_not_delay_the_stop_of_its_worker(workspace: Workspace) -> None:
    job_id = workspace.submit(**ENDLESS)
    with workspace.worker() as worker:
        workspace.wait(job_id, lambda job: job.step >= 1)
        with stopped_trainer(workspace, job_id):
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(12) == 0
        assert not trainer_pids(job_id)
        job = workspace.service.jobs.get(job_id)
        assert (job.status, job.deaths) == (JobStatus.QUEUED, [])
