"""The supervisor with real trainers: what it does when they end, however they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_service.jobs import FailureReason, JobStatus
from tests.tiny_model import build_tiny_model
from tests.workspace import ROOT, Workspace, no_trainer_within, trainer_pids
from workers.__main__ import make_slots
from workers.supervisor import Slot, trainer_death

ENDLESS = {"max_steps": 100_000}


@pytest.fixture
def workspace(tmp_path: Path, tiny_model: Path) -> Workspace:
    return Workspace(tmp_path / "data", tiny_model)


@pytest.mark.parametrize("module", ["workers.supervisor", "workers.__main__"])
def test_the_supervisor_imports_no_torch(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "print([name for name in ('torch', 'transformers', 'peft', 'bitsandbytes', 'datasets') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_killed_trainer_fails_its_job_with_the_signal_and_the_next_job_runs(workspace: Workspace) -> None:
    first, second = workspace.submit(**ENDLESS), workspace.submit()
    with workspace.worker():
        job = workspace.wait(first, lambda job: job.step >= 2)
        (pid,) = trainer_pids(first)
        os.kill(pid, signal.SIGKILL)
        killed_at = time.monotonic()
        failed = workspace.wait_for_end(first)
        assert time.monotonic() - killed_at < 2
        assert failed.status is JobStatus.FAILED
        assert failed.error is not None
        assert failed.error["details"]["reason"] == FailureReason.TRAINER_DIED
        assert failed.error["details"]["signal"] == "SIGKILL"
        assert failed.error["details"]["last_step"] >= job.step
        assert "SIGKILL" in failed.error["message"]
        assert workspace.wait_for_end(second).status is JobStatus.SUCCEEDED
    assert list(workspace.settings.tmp_dir.iterdir()) == []


def test_the_same_job_in_two_trainers_gives_the_same_adapter_sha256(workspace: Workspace) -> None:
    jobs = [workspace.submit(max_steps=6), workspace.submit(max_steps=6)]
    with workspace.worker():
        for job_id in jobs:
            assert workspace.wait_for_end(job_id).status is JobStatus.SUCCEEDED
    first, second = (workspace.service.artifact(job_id, "adapter_model.safetensors").file for job_id in jobs)
    assert first.sha256 == second.sha256
    assert workspace.service.manifest(jobs[0]).plan == workspace.service.manifest(jobs[1]).plan


def test_cancel_stops_a_running_job_at_the_next_step(workspace: Workspace) -> None:
    job_id = workspace.submit(**ENDLESS)
    with workspace.worker():
        workspace.wait(job_id, lambda job: job.step >= 1)
        workspace.service.cancel(job_id)
        asked_at = time.monotonic()
        assert workspace.wait_for_end(job_id).status is JobStatus.CANCELLED
        assert time.monotonic() - asked_at < 10  # long before the grace period's end
        assert no_trainer_within(job_id, 5)


def test_a_stopped_worker_gives_its_job_back(workspace: Workspace) -> None:
    job_id = workspace.submit(**ENDLESS)
    with workspace.worker() as worker:
        workspace.wait(job_id, lambda job: job.step >= 1)
        worker.send_signal(signal.SIGTERM)
        stopped_at = time.monotonic()
        assert worker.wait(15) == 0
        assert time.monotonic() - stopped_at < 9
        assert not trainer_pids(job_id)
        job = workspace.service.get_job(job_id)
        assert job.status is JobStatus.QUEUED
        assert job.attempt == 1


def test_a_killed_worker_takes_its_trainer_along_and_the_next_worker_runs_the_job(workspace: Workspace) -> None:
    job_id = workspace.submit(max_steps=150)
    with workspace.worker() as worker:
        workspace.wait(job_id, lambda job: job.step >= 1)
        worker.kill()
        worker.wait()
        assert no_trainer_within(job_id, 5)
    with workspace.worker():
        job = workspace.wait_for_end(job_id)
    assert job.status is JobStatus.SUCCEEDED
    assert job.attempt == 2
    assert job.result is not None
    assert job.result["attempt"] == 2
    steps = [record["step"] for record in workspace.service.job_metrics(job_id) if "loss" in record]
    assert steps == list(range(1, 151))


def test_a_trainer_whose_claim_is_lost_ends_and_writes_nothing(workspace: Workspace) -> None:
    job_id = workspace.submit(**ENDLESS)
    with workspace.worker():
        workspace.wait(job_id, lambda job: job.step >= 1)
        (zombie,) = trainer_pids(job_id)
        os.kill(zombie, signal.SIGSTOP)
        try:
            # The lease runs out while the process stands still, and a second worker takes the job.
            with workspace.worker():
                workspace.wait(job_id, lambda job: job.attempt == 2 and job.step >= 1)
                os.kill(zombie, signal.SIGCONT)
                deadline = time.monotonic() + 10
                while zombie in trainer_pids(job_id):
                    assert time.monotonic() < deadline, "the zombie lives on"
                    time.sleep(0.05)
                workspace.service.cancel(job_id)
                assert workspace.wait_for_end(job_id).status is JobStatus.CANCELLED
        finally:
            if zombie in trainer_pids(job_id):
                os.kill(zombie, signal.SIGKILL)


def test_death_says_where_and_how(workspace: Workspace) -> None:
    job = workspace.service.get_job(workspace.submit())
    assert "exit code 3" in trainer_death(job, 3, "x.log").message
    assert trainer_death(job, 3, "x.log").details["exit_code"] == 3
    assert trainer_death(job, -signal.SIGSEGV, "x.log").details["signal"] == "SIGSEGV"


def test_death_by_a_signal_without_a_name_is_told(workspace: Workspace) -> None:
    job = workspace.service.get_job(workspace.submit())
    assert trainer_death(job, -40, "x.log").details["signal"] == "signal 40"


def test_a_job_whose_base_changed_since_it_was_posted_is_failed(workspace: Workspace, tmp_path: Path) -> None:
    job_id = workspace.submit()
    workspace.catalog.remove("tiny")
    workspace.catalog.import_model("tiny", build_tiny_model(tmp_path / "other", seed=1))
    with workspace.worker():
        job = workspace.wait_for_end(job_id)
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert "other weights" in job.error["message"]


def test_an_attempt_that_cannot_be_started_is_failed_and_the_slot_goes_on(workspace: Workspace) -> None:
    logs = workspace.settings.data_dir / "logs"
    with workspace.worker():
        while not logs.is_dir():
            time.sleep(0.05)
        logs.rmdir()
        logs.write_text("in the way")
        failed = workspace.wait_for_end(workspace.submit())
        assert failed.status is JobStatus.FAILED
        assert failed.error is not None
        assert "could not be started" in failed.error["message"]
        logs.unlink()
        logs.mkdir()
        assert workspace.wait_for_end(workspace.submit()).status is JobStatus.SUCCEEDED


def test_scratch_of_a_killed_supervisor_is_reaped(workspace: Workspace) -> None:
    left = workspace.settings.tmp_dir / "job_0000-1"
    left.mkdir()
    (left / "rows.arrow").write_text("left behind")
    job_id = workspace.submit()
    with workspace.worker():
        assert workspace.wait_for_end(job_id).status is JobStatus.SUCCEEDED
    assert not left.exists()


def test_one_slot_per_gpu_and_at_least_one() -> None:
    assert make_slots(None, []) == [Slot(0, None)]
    assert make_slots(2, []) == [Slot(0, None), Slot(1, None)]
    assert make_slots(None, ["GPU-a", "GPU-b"]) == [Slot(0, "GPU-a"), Slot(1, "GPU-b")]
    assert make_slots(1, ["GPU-a", "GPU-b"]) == [Slot(0, "GPU-a")]
    assert Slot(0, "GPU-a").environment()["CUDA_VISIBLE_DEVICES"] == "GPU-a"


def test_a_trainer_that_hangs_is_killed_when_its_job_is_cancelled(workspace: Workspace) -> None:
    job_id = workspace.submit(**ENDLESS)
    with workspace.worker(QLORA_CANCEL_GRACE_S="1", QLORA_LEASE_S="60"):
        workspace.wait(job_id, lambda job: job.step >= 1)
        (pid,) = trainer_pids(job_id)
        os.kill(pid, signal.SIGSTOP)
        workspace.service.cancel(job_id)
        job = workspace.wait(job_id, lambda job: job.status.terminal, limit_s=10)
        assert job.status is JobStatus.CANCELLED
        assert no_trainer_within(job_id, 1)


def test_a_trainer_that_hangs_does_not_hold_up_the_workers_stop(workspace: Workspace) -> None:
    job_id = workspace.submit(**ENDLESS)
    with workspace.worker(QLORA_LEASE_S="60") as worker:
        workspace.wait(job_id, lambda job: job.step >= 1)
        (pid,) = trainer_pids(job_id)
        os.kill(pid, signal.SIGSTOP)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(12) == 0
        assert not trainer_pids(job_id)
        assert workspace.service.get_job(job_id).status is JobStatus.QUEUED
