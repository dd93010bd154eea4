"""The supervisor with real trainers that are killed, hang, or exit without an outcome."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from qlora_service.domain.jobs import FailureReason, JobStatus
from tests.chaos._verdict import leftovers
from tests.workers.supervisor._jobs import ENDLESS, resumed_from, stopped_trainer
from tests.workspace import ROOT, Workspace, no_trainer_within, started_at, trainer_pids
from workers import exit_codes
from workers.supervisor.supervisor import death_cause


def test_a_killed_trainer_is_replaced_at_once_and_the_job_ends_with_the_same_adapter(served: Workspace) -> None:
    uninterrupted, killed = served.submit(max_steps=40), served.submit(max_steps=40)
    served.wait_for_end(uninterrupted)
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
    assert served.adapter_sha256(killed) == served.adapter_sha256(uninterrupted)
    assert served.service.artifacts.manifest(killed).plan == served.service.artifacts.manifest(uninterrupted).plan
    assert resumed_from(served, killed) >= 3
    # The published metrics are complete: every step once.
    published = [json.loads(line) for line in served.artifact(killed, "metrics.jsonl").splitlines()]
    assert [record["step"] for record in published if "loss" in record] == list(range(1, 41))
    # The scratch files of the job are deleted soon.
    assert leftovers(served, limit_s=10) == []


def test_a_job_whose_trainers_keep_dying_fails_with_every_cause_and_the_next_job_runs(served: Workspace) -> None:
    poison, next_job = served.submit(**ENDLESS), served.submit()
    killed: set[int] = set()
    while not (job := served.service.jobs.get(poison)).status.terminal:
        for pid in set(trainer_pids(poison)) - killed:
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert job.error["details"]["reason"] == FailureReason.TRAINER_DIED
    assert [death["signal"] for death in job.error["details"]["deaths"]] == ["SIGKILL"] * 3
    assert job.error["message"].count("killed by SIGKILL") == 3
    assert job.attempt == len(killed) == 3
    assert served.wait_for_end(next_job).status is JobStatus.SUCCEEDED


def test_a_trainer_stopped_past_its_lease_is_replaced(workspace: Workspace) -> None:
    job_id = workspace.submit(**ENDLESS)
    with workspace.worker(QLORA_LEASE_S="8"):
        before = workspace.wait(job_id, lambda job: job.step >= 1).attempt
        with stopped_trainer(workspace, job_id) as stopped:
            workspace.wait(job_id, lambda job: job.attempt > before, limit_s=25)
            assert stopped not in trainer_pids(job_id)


def test_a_trainer_that_exits_with_0_and_no_outcome_counts_as_dead(workspace: Workspace, tmp_path: Path) -> None:
    exiting = "import os, sys\nif 'workers.trainer' in sys.orig_argv:\n    os._exit(0)\n"
    (tmp_path / "sitecustomize.py").write_text(exiting)
    with workspace.worker(PYTHONPATH=str(tmp_path)):
        job = workspace.wait(workspace.submit(), lambda job: job.status.terminal, limit_s=30)
    assert job.status is JobStatus.FAILED
    assert [death["exit_code"] for death in job.deaths] == [0, 0, 0]


def test_a_trainer_killed_while_the_oom_counter_rose_ran_out_of_host_memory(
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


def test_a_trainer_that_hangs_is_killed_when_its_job_is_cancelled(workspace: Workspace) -> None:
    job_id = workspace.submit(**ENDLESS)
    with workspace.worker(QLORA_CANCEL_GRACE_S="1"):
        workspace.wait(job_id, lambda job: job.step >= 1)
        with stopped_trainer(workspace, job_id):
            workspace.service.jobs.cancel(job_id)
            job = workspace.wait(job_id, lambda job: job.status.terminal, limit_s=10)
            assert job.status is JobStatus.CANCELLED
            assert no_trainer_within(job_id, 1)


def test_cause_of_death_names_exit_code_or_signal_and_the_log() -> None:
    assert "exit code 3" in death_cause(3, "ended", "x.log", host_oom=False)["message"]
    assert death_cause(3, "ended", "x.log", host_oom=False)["exit_code"] == 3
    assert death_cause(-signal.SIGSEGV, "ended", "x.log", host_oom=True)["signal"] == "SIGSEGV"
    assert death_cause(-40, "ended", "x.log", host_oom=False)["signal"] == "signal 40"
    assert "made no progress" in death_cause(exit_codes.HUNG, "ended", "x.log", host_oom=False)["message"]
    assert "x.log" in death_cause(3, "ended", "x.log", host_oom=False)["message"]


def test_cause_of_death_names_a_lack_of_host_memory() -> None:
    cause = death_cause(-signal.SIGKILL, "ended", "x.log", host_oom=True)
    assert cause["reason"] == FailureReason.HOST_OUT_OF_MEMORY
    assert "memory" in cause["message"]
    cause = death_cause(-signal.SIGKILL, "ended", "x.log", host_oom=False)
    assert cause["reason"] == FailureReason.TRAINER_DIED
