"""The supervisor with real trainers: what it does when they end, however they end."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from qlora_service.domain.jobs import FailureReason, HoldReason, JobStatus
from tests.chaos._verdict import leftovers
from tests.tiny_model import build_tiny_model
from tests.workspace import ROOT, Workspace, no_trainer_within, started_at, trainer_pids
from workers import exit_codes
from workers.__main__ import make_slots
from workers.supervisor.slot_lock import SlotLock
from workers.supervisor.supervisor import Slot, death

ENDLESS = {"max_steps": 100_000}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Workspace]:
    """A workspace with a worker, for the tests that leave both as they were: a trainer may wait for the next one."""
    workspace = Workspace(tmp_path_factory.mktemp("served") / "data", tiny_model)
    with workspace.worker(QLORA_CHECKPOINT_S="0"):
        yield workspace


def resumed_from(workspace: Workspace, job_id: str) -> int:
    """The step after which the job's second attempt went on."""
    events = workspace.service.jobs.events(job_id)
    return next(int(event.data["resumed_from_step"]) for event in events if "resumed_from_step" in event.data)


@pytest.mark.parametrize("module", ["workers.supervisor.supervisor", "workers.__main__"])
def test_the_supervisor_imports_no_torch(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "print([name for name in ('torch', 'transformers', 'peft', 'bitsandbytes', 'datasets') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_killed_trainer_is_followed_at_once_by_one_that_goes_on_to_the_same_adapter(served: Workspace) -> None:
    undisturbed, killed = served.submit(max_steps=40), served.submit(max_steps=40)
    served.wait_for_end(undisturbed)
    served.wait(killed, lambda job: job.checkpoint_step >= 3)
    (pid,) = trainer_pids(killed)
    os.kill(pid, signal.SIGKILL)
    killed_at = time.monotonic()
    while not (successors := set(trainer_pids(killed)) - {pid}):
        assert time.monotonic() - killed_at < 60
        time.sleep(0.02)
    assert started_at(successors.pop()) - killed_at < 3
    job = served.wait_for_end(killed)
    assert (job.status, job.attempt) == (JobStatus.SUCCEEDED, 2)
    assert served.adapter_sha256(killed) == served.adapter_sha256(undisturbed)
    assert served.service.artifacts.manifest(killed).plan == served.service.artifacts.manifest(undisturbed).plan
    assert resumed_from(served, killed) >= 3
    # The published metrics are whole: every step once.
    published = [json.loads(line) for line in served.artifact(killed, "metrics.jsonl").splitlines()]
    assert [record["step"] for record in published if "loss" in record] == list(range(1, 41))
    # Soon nothing is left of what the job needed while it ran.
    assert leftovers(served, limit_s=10) == []


def test_a_job_whose_trainers_keep_dying_is_failed_with_every_cause_and_the_next_one_runs(served: Workspace) -> None:
    poison, next_job = served.submit(**ENDLESS), served.submit()
    seen: set[int] = set()
    while not (job := served.service.jobs.get(poison)).status.terminal:
        for pid in set(trainer_pids(poison)) - seen:
            seen.add(pid)
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert job.error["details"]["reason"] == FailureReason.TRAINER_DIED
    assert [death["signal"] for death in job.error["details"]["deaths"]] == ["SIGKILL"] * 3
    assert job.error["message"].count("killed by SIGKILL") == 3
    assert job.attempt == len(seen) == 3
    assert served.wait_for_end(next_job).status is JobStatus.SUCCEEDED


def test_cancel_stops_a_running_job_at_the_next_step(served: Workspace) -> None:
    job_id = served.submit(**ENDLESS)
    served.wait(job_id, lambda job: job.step >= 1)
    served.service.jobs.cancel(job_id)
    asked_at = time.monotonic()
    assert served.wait_for_end(job_id).status is JobStatus.CANCELLED
    assert time.monotonic() - asked_at < 10  # long before the grace period's end
    assert no_trainer_within(job_id, 5)


# Another thread takes the signal, as when it comes just before the main thread begins to wait: nothing wakes that.
SIGNALLED_ASIDE = """
import signal, threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
from workers.__main__ import main
main()
"""


def test_a_worker_ends_however_a_stop_signal_comes_in(tmp_path: Path) -> None:
    environment = os.environ | {"QLORA_DATA_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SIGNALLED_ASIDE]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as worker:
        try:
            assert worker.stderr is not None
            assert any("supervisor_ready" in line for line in worker.stderr)
            worker.terminate()
            worker.wait(10)
        finally:
            worker.kill()


def test_a_stopped_worker_loses_no_completed_step(workspace: Workspace) -> None:
    undisturbed, stopped = workspace.submit(max_steps=120), workspace.submit(max_steps=120)
    with workspace.worker() as worker:
        workspace.wait_for_end(undisturbed)
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
    assert workspace.adapter_sha256(stopped) == workspace.adapter_sha256(undisturbed)
    metrics = [record["step"] for record in workspace.service.jobs.metrics(stopped) if "loss" in record]
    assert metrics == list(range(1, 121))


def test_a_paused_job_waits_and_goes_on_where_it_was(served: Workspace) -> None:
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


def test_a_more_urgent_job_takes_the_slot_and_the_other_goes_on_afterwards(served: Workspace) -> None:
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


def test_no_more_of_a_projects_jobs_run_than_may(workspace: Workspace) -> None:
    first, second = workspace.submit(**ENDLESS), workspace.submit(max_steps=2)
    with workspace.worker(QLORA_SLOTS="2", QLORA_MAX_RUNNING_JOBS="1"):
        # Until it trains a second slot has looked for work many times.
        workspace.wait(first, lambda job: job.step >= 1)
        assert workspace.service.jobs.get(second).status is JobStatus.QUEUED
        # It makes room for its own project's more urgent job, and for nobody less urgent.
        urgent = workspace.submit(priority=5, max_steps=2)
        assert workspace.wait_for_end(urgent).status is JobStatus.SUCCEEDED
        assert workspace.service.jobs.get(second).status is JobStatus.QUEUED
        workspace.service.jobs.cancel(first)
        assert workspace.wait_for_end(second).status is JobStatus.SUCCEEDED


def test_a_killed_worker_takes_its_trainer_along_and_the_next_worker_goes_on_at_once(workspace: Workspace) -> None:
    job_id = workspace.submit(max_steps=100)
    with workspace.worker(QLORA_CHECKPOINT_S="0") as worker:
        workspace.wait(job_id, lambda job: job.checkpoint_step >= 3)
        worker.kill()
        worker.wait()
        assert no_trainer_within(job_id, 5)
    began_at = time.monotonic()
    with workspace.worker():
        workspace.wait(job_id, lambda job: job.attempt == 2, limit_s=10)  # long before the lease's end
        assert time.monotonic() - began_at < 8
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
            # Whichever is first in the queue: somebody runs again, on a slot that is free.
            workspace.wait(first_job, lambda job: job.attempt == 2 and job.phase != "starting")
            assert len(trainer_pids(first_job) + trainer_pids(second_job)) == 1


@contextmanager
def standing_still(workspace: Workspace, job_id: str) -> Iterator[int]:
    """The job's trainer, stopped where it does not hold SQLite's write lock, for which everybody would wait."""
    (pid,) = trainer_pids(job_id)
    database = workspace.settings.data_dir / "state.db"
    while True:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.05)
        other = sqlite3.connect(database, timeout=0.3, isolation_level=None)
        with closing(other), suppress(sqlite3.OperationalError):
            other.execute("BEGIN IMMEDIATE")
            break
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.02)
    try:
        yield pid
    finally:
        if pid in trainer_pids(job_id):
            os.kill(pid, signal.SIGKILL)


def test_a_trainer_that_stands_still_past_its_lease_is_followed_by_another(workspace: Workspace) -> None:
    job_id = workspace.submit(**ENDLESS)
    with workspace.worker(QLORA_LEASE_S="8"):
        before = workspace.wait(job_id, lambda job: job.step >= 1).attempt
        with standing_still(workspace, job_id) as frozen:
            workspace.wait(job_id, lambda job: job.attempt > before, limit_s=25)
            assert frozen not in trainer_pids(job_id)


def test_a_slot_is_taken_over_from_a_dead_worker_once_its_trainer_that_stands_still_is_gone(
    workspace: Workspace,
) -> None:
    job_id = workspace.submit(**ENDLESS)
    with workspace.worker() as first:
        workspace.wait(job_id, lambda job: job.step >= 1)
        with standing_still(workspace, job_id) as frozen:
            first.kill()
            first.wait()
            lock = SlotLock(workspace.settings.resolved_lock_dir, "cpu-0")
            assert not lock.acquire()
            assert lock.other_holders() == [frozen]
            lock.close()
            with workspace.worker():
                workspace.wait(job_id, lambda job: job.attempt == 2, limit_s=25)
                assert frozen not in trainer_pids(job_id)


def test_a_trainer_that_ends_well_without_an_outcome_has_died(workspace: Workspace, tmp_path: Path) -> None:
    leaving = "import os, sys\nif 'workers.trainer' in sys.orig_argv:\n    os._exit(0)\n"
    (tmp_path / "sitecustomize.py").write_text(leaving)
    with workspace.worker(PYTHONPATH=str(tmp_path)):
        job = workspace.wait(workspace.submit(), lambda job: job.status.terminal, limit_s=30)
    assert job.status is JobStatus.FAILED
    assert [death["exit_code"] for death in job.deaths] == [0, 0, 0]


def test_a_trainer_killed_while_the_kernel_counted_one_ran_out_of_the_hosts_memory(
    workspace: Workspace, tmp_path: Path
) -> None:
    counter = tmp_path / "vmstat"
    counter.write_text("oom_kill 7\n")
    script = (
        f"import pathlib, workers.supervisor.host_memory as host; host.VMSTAT = pathlib.Path({str(counter)!r}); "
        "from workers.__main__ import main; main()"
    )
    environment = os.environ | {"QLORA_DATA_DIR": str(workspace.settings.data_dir)}
    job_id, reasons = workspace.submit(**ENDLESS), list[str]()
    worker = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    try:
        for attempt in (1, 2):
            workspace.wait(job_id, lambda job, attempt=attempt: job.attempt == attempt and trainer_pids(job_id) != [])
            if attempt == 1:
                counter.write_text("oom_kill 8\n")
            os.kill(trainer_pids(job_id)[0], signal.SIGKILL)
            job = workspace.wait(job_id, lambda job, attempt=attempt: len(job.deaths) == attempt)
            reasons.append(job.deaths[-1]["reason"])
    finally:
        worker.terminate()
        worker.wait(30)
    assert reasons == [FailureReason.HOST_OUT_OF_MEMORY, FailureReason.TRAINER_DIED]


def test_death_says_how() -> None:
    assert "exit code 3" in death(3, "ended", "x.log", host_oom=False)["message"]
    assert death(3, "ended", "x.log", host_oom=False)["exit_code"] == 3
    assert death(-signal.SIGSEGV, "ended", "x.log", host_oom=True)["signal"] == "SIGSEGV"
    assert death(-40, "ended", "x.log", host_oom=False)["signal"] == "signal 40"
    assert "made no progress" in death(exit_codes.HUNG, "ended", "x.log", host_oom=False)["message"]
    assert "x.log" in death(3, "ended", "x.log", host_oom=False)["message"]


def test_a_kill_for_want_of_the_hosts_memory_is_named_so() -> None:
    cause = death(-signal.SIGKILL, "ended", "x.log", host_oom=True)
    assert cause["reason"] == FailureReason.HOST_OUT_OF_MEMORY
    assert "memory" in cause["message"]
    cause = death(-signal.SIGKILL, "ended", "x.log", host_oom=False)
    assert cause["reason"] == FailureReason.TRAINER_DIED


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


def test_scratch_of_a_killed_supervisor_is_reaped(workspace: Workspace) -> None:
    left = workspace.settings.tmp_dir / "job_0000-1"
    left.mkdir()
    (left / "rows.arrow").write_text("left behind")
    ended = workspace.submit()
    workspace.service.jobs.cancel(ended)
    checkpoint = workspace.settings.checkpoint_dir / ended / "step-00000001.a1"
    checkpoint.mkdir(parents=True)
    job_id = workspace.submit()
    with workspace.worker():
        assert workspace.wait_for_end(job_id).status is JobStatus.SUCCEEDED
    assert not left.exists()
    assert not checkpoint.parent.exists()


def test_one_slot_per_gpu_and_at_least_one() -> None:
    assert make_slots(None, []) == [Slot(0, None)]
    assert make_slots(2, []) == [Slot(0, None), Slot(1, None)]
    assert make_slots(None, ["GPU-a", "GPU-b"]) == [Slot(0, "GPU-a"), Slot(1, "GPU-b")]
    assert make_slots(1, ["GPU-a", "GPU-b"]) == [Slot(0, "GPU-a")]
    assert Slot(0, "GPU-a").environment()["CUDA_VISIBLE_DEVICES"] == "GPU-a"


def test_a_trainer_that_hangs_is_killed_when_its_job_is_cancelled(workspace: Workspace) -> None:
    job_id = workspace.submit(**ENDLESS)
    with workspace.worker(QLORA_CANCEL_GRACE_S="1"):
        workspace.wait(job_id, lambda job: job.step >= 1)
        with standing_still(workspace, job_id):
            workspace.service.jobs.cancel(job_id)
            job = workspace.wait(job_id, lambda job: job.status.terminal, limit_s=10)
            assert job.status is JobStatus.CANCELLED
            assert no_trainer_within(job_id, 1)


def test_a_trainer_that_hangs_does_not_hold_up_the_workers_stop(workspace: Workspace) -> None:
    job_id = workspace.submit(**ENDLESS)
    with workspace.worker() as worker:
        workspace.wait(job_id, lambda job: job.step >= 1)
        with standing_still(workspace, job_id):
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(12) == 0
        assert not trainer_pids(job_id)
        job = workspace.service.jobs.get(job_id)
        assert (job.status, job.deaths) == (JobStatus.QUEUED, [])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_pauses_the_job_until_there_is_room(small_disk: Path, tiny_model: Path) -> None:
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
