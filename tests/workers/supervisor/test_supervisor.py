"""The supervisor with real trainers: requests of users, limits, slots, and a full disk."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from qlora_service.domain.jobs import HoldReason, JobStatus
from tests.tiny_model import build_tiny_model
from tests.workers.supervisor._jobs import ENDLESS, resumed_from
from tests.workspace import ROOT, Workspace, no_trainer_within
from workers.__main__ import make_slots
from workers.supervisor.supervisor import Slot


@pytest.mark.parametrize("module", ["workers.supervisor.supervisor", "workers.__main__"])
def test_the_supervisor_imports_no_torch(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "print([name for name in ('torch', 'transformers', 'peft', 'bitsandbytes', 'datasets') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_cancel_stops_a_running_job_at_the_next_step(served: Workspace) -> None:
    job_id = served.submit(**ENDLESS)
    served.wait(job_id, lambda job: job.step >= 1)
    served.service.jobs.cancel(job_id)
    requested_at = time.monotonic()
    assert served.wait_for_end(job_id).status is JobStatus.CANCELLED
    assert time.monotonic() - requested_at < 10  # long before the end of the grace period
    assert no_trainer_within(job_id, 5)


def test_a_paused_job_resumes_from_its_checkpoint(served: Workspace) -> None:
    job_id = served.submit(**ENDLESS)
    served.wait(job_id, lambda job: job.step >= 2)
    served.service.jobs.pause(job_id)
    job = served.wait(job_id, lambda job: job.status is JobStatus.PAUSED, limit_s=15)
    assert job.checkpoint_step >= 2
    assert no_trainer_within(job_id, 5)
    other = served.submit()
    assert served.wait_for_end(other).status is JobStatus.SUCCEEDED
    served.service.jobs.resume(job_id)
    resumed = served.wait(job_id, lambda later: later.step > job.checkpoint_step)
    assert resumed.attempt == 2
    served.service.jobs.cancel(job_id)
    served.wait_for_end(job_id)


def test_a_more_urgent_job_takes_the_slot_and_the_other_resumes_afterwards(served: Workspace) -> None:
    patient = served.submit(max_steps=120)
    served.wait(patient, lambda job: job.step >= 2)
    urgent = served.wait_for_end(served.submit(priority=5))
    job = served.wait_for_end(patient)
    assert urgent.status is JobStatus.SUCCEEDED
    assert (job.status, job.attempt, job.deaths) == (JobStatus.SUCCEEDED, 2, [])
    assert urgent.finished_at is not None
    assert job.finished_at is not None
    assert urgent.finished_at < job.finished_at
    assert resumed_from(served, patient) >= 2


def test_the_limit_of_running_jobs_per_project_holds(workspace: Workspace) -> None:
    first, second = workspace.submit(**ENDLESS), workspace.submit(max_steps=2)
    with workspace.worker(QLORA_SLOTS="2", QLORA_MAX_RUNNING_JOBS="1"):
        # Before the job trains, the second slot has tried to claim many times.
        workspace.wait(first, lambda job: job.step >= 1)
        assert workspace.service.jobs.get(second).status is JobStatus.QUEUED
        # A more urgent job of the project preempts it; an equally urgent one does not.
        urgent = workspace.submit(priority=5, max_steps=2)
        assert workspace.wait_for_end(urgent).status is JobStatus.SUCCEEDED
        assert workspace.service.jobs.get(second).status is JobStatus.QUEUED
        workspace.service.jobs.cancel(first)
        assert workspace.wait_for_end(second).status is JobStatus.SUCCEEDED


def test_a_job_whose_base_changed_since_it_was_posted_fails(workspace: Workspace, tmp_path: Path) -> None:
    job_id = workspace.submit()
    workspace.catalog.remove("tiny")
    workspace.catalog.import_model("tiny", build_tiny_model(tmp_path / "other", seed=1))
    with workspace.worker():
        job = workspace.wait_for_end(job_id)
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert "other weights" in job.error["message"]


def test_an_attempt_that_cannot_be_started_fails_and_the_slot_runs_the_next_job(workspace: Workspace) -> None:
    logs = workspace.settings.data_dir / "logs"
    with workspace.worker(QLORA_MAX_DEATHS="1"):
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


def test_one_slot_per_gpu_and_at_least_one() -> None:
    assert make_slots(None, []) == [Slot(0, None)]
    assert make_slots(2, []) == [Slot(0, None), Slot(1, None)]
    assert make_slots(None, ["GPU-a", "GPU-b"]) == [Slot(0, "GPU-a"), Slot(1, "GPU-b")]
    assert make_slots(1, ["GPU-a", "GPU-b"]) == [Slot(0, "GPU-a")]
    assert Slot(0, "GPU-a").environment()["CUDA_VISIBLE_DEVICES"] == "GPU-a"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 MiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(directory)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


def test_a_full_disk_pauses_the_job_until_space_is_free(small_disk: Path, tiny_model: Path) -> None:
    workspace = Workspace(small_disk / "data", tiny_model)
    job_id = workspace.submit(max_steps=3000)
    filler = small_disk / "filler"
    with workspace.worker(QLORA_CHECKPOINT_S="0.5"):
        workspace.wait(job_id, lambda job: job.checkpoint_step >= 2)
        with suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(2**20))
        job = workspace.wait(job_id, lambda job: job.status is JobStatus.PAUSED)
        assert job.hold is not None
        assert job.hold["reason"] == HoldReason.DISK_FULL
        assert "disk is full" in job.hold["message"]
        assert job.checkpoint_step >= 2
        assert no_trainer_within(job_id, 10)
        assert workspace.service.jobs.get(job_id).status is JobStatus.PAUSED
        filler.unlink()
        workspace.wait(job_id, lambda later: later.step > job.checkpoint_step)
        workspace.service.jobs.cancel(job_id)
        workspace.wait_for_end(job_id)
