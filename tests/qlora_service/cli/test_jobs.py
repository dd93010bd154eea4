from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qlora_service.client import Client
from qlora_service.queue.claim import Claim, Progress
from qlora_service.queue.queue import Queue
from tests.breaking_proxy import BreakingProxy
from tests.running_api import RunningApi, succeed

SPEC = {"base_model": "tiny", "priority": 100, "training": {"max_seq_len_tokens": 64}}


@pytest.fixture
def claim(client: Client, queue: Queue, rows: Path) -> Claim:
    """The claim of a running job."""
    job = client.submit(SPEC, rows)
    claimed = queue.claim("test")
    assert claimed is not None
    assert claimed[1].id == job.id
    return claimed[0]


def report(queue: Queue, claim: Claim, step: int) -> None:
    metrics = {"loss": 0.5, "eval_loss": 6.25, "tokens_per_second": 240.2}
    queue.report(claim, Progress(phase="training", step=step, total_steps=40, eta_s=75.0, metrics=metrics))


def end(data_dir: Path, queue: Queue, claim: Claim, status: str) -> None:
    match status:
        case "succeeded":
            succeed(data_dir, queue, claim, {"adapter_config.json": b"{}"})
        case "failed":
            queue.fail(claim, {"code": "job_failed", "message": "the trainer was ended by SIGKILL at step 3"})
        case "cancelled":
            queue.cancelled(claim)


@pytest.mark.parametrize(
    ("status", "code", "note"),
    [("succeeded", 0, "qlora download"), ("failed", 4, "failed: the trainer was ended"), ("cancelled", 5, "cancelled")],
)
def test_watch_exits_with_the_jobs_outcome(
    run: Any, api: RunningApi, queue: Queue, claim: Claim, status: str, code: int, note: str
) -> None:
    end(api.data_dir, queue, claim, status)
    outcome = run("watch", claim.job_id)
    assert outcome.code == code
    assert note in outcome.stderr
    assert outcome.stdout == ""


@contextmanager
def watching(api: RunningApi, claim: Claim, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """`qlora watch` of the job, in its own process."""
    command = [sys.executable, "-m", "qlora_service.cli", "watch", claim.job_id, "--url", api.url, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_line(watch: subprocess.Popen[str], phase: str) -> str:
    """The next line about the phase."""
    assert watch.stderr is not None
    line = next((line for line in watch.stderr if line.partition(" · ")[0].strip() == phase), None)
    assert line is not None, f"`qlora watch` ended without a line about {phase}"
    return line.strip()


def test_watch_shows_progress_and_survives_a_restart(api: RunningApi, queue: Queue, claim: Claim) -> None:
    report(queue, claim, step=12)
    with watching(api, claim, "--json") as watch:
        line = "training · step 12/40 · loss 0.5000 · held-out 6.2500 · 240 tokens/s · 1 min 15 s left"
        assert wait_for_line(watch, "training") == line
        api.stop(signal.SIGKILL)
        assert wait_for_line(watch, "service unreachable, reconnecting")
        api.start()
        end(api.data_dir, queue, claim, "succeeded")
        assert watch.stdout is not None
        assert json.loads(watch.stdout.read())["status"] == "succeeded"
        assert watch.wait(60) == 0


def test_watch_prints_each_warning_once(run: Any, api: RunningApi, queue: Queue, claim: Claim) -> None:
    report(queue, claim, step=12)
    queue.warn(claim, ["left out: 1 row (line 9): [odd]"])
    with watching(api, claim) as watch:
        assert watch.stderr is not None
        assert watch.stderr.readline() == "warning: left out: 1 row (line 9): [odd]\n"
        wait_for_line(watch, "training")
        queue.warn(claim, ["the held-out loss rose"])
        end(api.data_dir, queue, claim, "succeeded")
        rest = watch.stderr.read()
    assert rest.count("warning: ") == rest.count("warning: the held-out loss rose\n") == 1


def test_watch_shows_why_a_job_is_paused_and_follows_it_further(
    api: RunningApi, client: Client, queue: Queue, claim: Claim
) -> None:
    report(queue, claim, step=12)
    with watching(api, claim) as watch:
        wait_for_line(watch, "training")
        client.pause(claim.job_id)
        wait_for_line(watch, "pausing")
        queue.report(claim, Progress(step=20, checkpoint_step=20))
        queue.release(claim, "it was asked to pause")
        wait_for_line(watch, f"paused: qlora resume {claim.job_id} puts it back into the queue")
        client.resume(claim.job_id)
        wait_for_line(watch, "queued to resume after step 20")
        claimed = queue.claim("test")
        assert claimed is not None
        queue.pause(claimed[0], {"reason": "disk_full", "message": "the checkpoint needs 5 GiB: free some"})
        wait_for_line(watch, "paused: the checkpoint needs 5 GiB: free some")
        client.cancel(claim.job_id)
        wait_for_line(watch, "cancelled")
        assert watch.wait(60) == 5


def test_job_is_paused_and_resumed(run: Any, client: Client, rows: Path) -> None:
    job = client.submit(SPEC, rows)
    paused = run("pause", job.id)
    assert paused.code == 0
    assert paused.stderr.strip() == f"job {job.id} is paused. Resume it: qlora resume {job.id}"
    assert json.loads(run("pause", job.id, "--json").stdout)["status"] == "paused"
    assert job.id in run("jobs", "--status", "paused").stdout
    resumed = run("resume", job.id)
    assert resumed.stderr.strip() == f"job {job.id} is queued"
    client.cancel(job.id)


def test_running_job_pauses_at_its_next_step(run: Any, queue: Queue, claim: Claim) -> None:
    note = run("pause", claim.job_id).stderr
    assert "is running and pauses at its next step" in note
    queue.report(claim, Progress(step=7, checkpoint_step=7))
    queue.release(claim, "it was asked to pause")
    assert "is queued and resumes after step 7" in run("resume", claim.job_id).stderr
    run("cancel", claim.job_id)


def test_interrupted_watch_leaves_the_job_running(api: RunningApi, client: Client, queue: Queue, claim: Claim) -> None:
    report(queue, claim, step=1)
    with watching(api, claim) as watch:
        wait_for_line(watch, "training")
        watch.send_signal(signal.SIGINT)
        assert watch.stderr is not None
        note = watch.stderr.read()
        assert watch.wait(60) == 130
    assert f"qlora cancel {claim.job_id}" in note
    assert "Traceback" not in note
    job = client.get(claim.job_id)
    assert (job.status, job.stop_request) == ("running", None)
    end(api.data_dir, queue, claim, "cancelled")


def test_watch_draws_a_bar_on_a_terminal(api: RunningApi, queue: Queue, claim: Claim) -> None:
    report(queue, claim, step=12)
    controller, terminal = os.openpty()
    command = [sys.executable, "-m", "qlora_service.cli", "watch", claim.job_id, "--url", api.url]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "140"}
    with subprocess.Popen(command, stderr=terminal, env=environment) as watch:
        os.close(terminal)
        drawn = b""
        while b"12/40 steps" not in drawn:
            drawn += os.read(controller, 4096)
        end(api.data_dir, queue, claim, "cancelled")
        assert watch.wait(60) == 5
    os.close(controller)
    assert "━".encode() in drawn


def test_download_prints_the_directory(run: Any, api: RunningApi, queue: Queue, claim: Claim, tmp_path: Path) -> None:
    end(api.data_dir, queue, claim, "succeeded")
    outcome = run("download", claim.job_id, tmp_path / "adapter")
    assert (outcome.code, outcome.stdout) == (0, f"{tmp_path / 'adapter'}\n")
    assert (tmp_path / "adapter" / "adapter_config.json").read_bytes() == b"{}"


def test_interrupted_download_prints_the_command_that_resumes_it(
    run: Any, api: RunningApi, queue: Queue, claim: Claim, tmp_path: Path
) -> None:
    weights = os.urandom(300_000)
    succeed(api.data_dir, queue, claim, {"adapter_model.safetensors": weights})
    target = tmp_path / "adapter"
    part = target / "adapter_model.safetensors.part"
    with BreakingProxy(api.port) as proxy:
        proxy.cut_after, proxy.stalls = 200_000, True
        command = [sys.executable, "-m", "qlora_service.cli", "download", claim.job_id, target, "--url", proxy.url]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as downloading:
            assert downloading.stderr is not None
            while not part.exists() or part.stat().st_size < 150_000:
                assert downloading.poll() is None
                time.sleep(0.02)
            downloading.send_signal(signal.SIGINT)
            note = downloading.stderr.read()
    assert downloading.returncode == 130
    assert note == f"stopped; the bytes received so far are kept. Resume: qlora download {claim.job_id} {target}\n"
    assert part.exists()
    assert run("download", claim.job_id, target).code == 0
    assert (target / "adapter_model.safetensors").read_bytes() == weights


def test_download_of_an_unfinished_job_is_refused(
    run: Any, api: RunningApi, queue: Queue, claim: Claim, tmp_path: Path
) -> None:
    outcome = run("download", claim.job_id, tmp_path / "adapter")
    assert outcome.code == 1
    assert "is running" in outcome.stderr
    assert not (tmp_path / "adapter").exists()
    end(api.data_dir, queue, claim, "cancelled")


def test_jobs_are_listed_with_whole_ids(run: Any, api: RunningApi, queue: Queue, claim: Claim) -> None:
    report(queue, claim, step=12)
    table = run("jobs", "--status", "running").stdout
    assert claim.job_id in table
    assert "12/40" in table
    listed = json.loads(run("jobs", "--status", "running", "--limit", 1, "--json").stdout)
    assert [job["id"] for job in listed] == [claim.job_id]
    end(api.data_dir, queue, claim, "failed")
    assert "no jobs" in run("jobs", "--base-model", "other").stderr


def test_cancel_prints_the_effect(run: Any, api: RunningApi, client: Client, queue: Queue, claim: Claim) -> None:
    outcome = run("cancel", claim.job_id)
    assert outcome.code == 0
    assert "running and stops at its next step" in outcome.stderr
    end(api.data_dir, queue, claim, "failed")
    again = run("cancel", claim.job_id)
    assert again.code == 1
    assert "failed already" in again.stderr
