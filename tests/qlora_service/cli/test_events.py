"""`qlora logs`, with and without following, against a running API."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_service.client import Client
from qlora_service.queue.claim import Claim, Progress
from qlora_service.queue.queue import Queue
from tests.running_api import RunningApi

SPEC = {"base_model": "tiny", "priority": 100, "training": {"max_seq_len_tokens": 64}}


@pytest.fixture
def claim(client: Client, queue: Queue, rows: Path) -> Claim:
    """The claim of a running job."""
    job = client.submit(SPEC, rows)
    claimed = queue.claim("test")
    assert claimed is not None
    assert claimed[1].id == job.id
    return claimed[0]


def report_step(queue: Queue, claim: Claim, number: int) -> None:
    queue.report(claim, Progress(step=number), ("metrics", {"loss": 1 / 3, "step": number, "eval_loss": None}))


def fail(queue: Queue, claim: Claim) -> None:
    queue.fail(claim, {"code": "job_failed", "message": "the trainer was ended by SIGKILL"})


def test_logs_are_a_line_per_event_up_to_the_latest(run: Any, queue: Queue, claim: Claim) -> None:
    report_step(queue, claim, 1)
    outcome = run("logs", claim.job_id)
    assert outcome.code == 0
    lines = outcome.stdout.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  (status|metrics) ", line) for line in lines)
    assert [line[21:] for line in lines] == [
        "status      queued",
        'status      running attempt=1 worker="test"',
        "metrics     step=1 loss=0.333333",
    ]
    fail(queue, claim)
    ended = run("logs", claim.job_id)
    assert ended.code == 0
    assert 'error="the trainer was ended by SIGKILL"' in ended.stdout.splitlines()[-1]


def test_logs_as_json_start_after_the_given_number(run: Any, queue: Queue, claim: Claim) -> None:
    report_step(queue, claim, 1)
    events = [json.loads(line) for line in run("logs", claim.job_id, "--json").stdout.splitlines()]
    assert [event["type"] for event in events] == ["status", "status", "metrics"]
    later = run("logs", claim.job_id, "--json", "--after", events[1]["seq"]).stdout
    assert [json.loads(line) for line in later.splitlines()] == events[2:]
    fail(queue, claim)


def test_followed_logs_survive_a_restart_and_exit_with_the_jobs_outcome(
    api: RunningApi, queue: Queue, claim: Claim
) -> None:
    report_step(queue, claim, 1)
    command = [sys.executable, "-m", "qlora_service.cli", "logs", claim.job_id, "-f", "--json", "--url", api.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        assert following.stderr is not None
        lines = [following.stdout.readline() for _ in range(3)]
        api.stop(signal.SIGKILL)
        report_step(queue, claim, 2)
        note = following.stderr.readline()
        api.start()
        fail(queue, claim)
        lines += following.stdout.readlines()
        assert following.stderr.read() == ""
        assert following.wait(60) == 4
    events = [json.loads(line) for line in lines]
    assert [event["data"].get("step") for event in events] == [None, None, 1, 2, None]
    assert re.search(r"^the service is not answering \(.+\): trying again for up to 600 s$", note.strip())


def test_interrupted_logs_print_the_command_that_continues(
    api: RunningApi, client: Client, queue: Queue, claim: Claim
) -> None:
    command = [sys.executable, "-m", "qlora_service.cli", "logs", claim.job_id, "-f", "--url", api.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        assert following.stderr is not None
        assert "queued" in following.stdout.readline()
        assert "running" in following.stdout.readline()
        following.send_signal(signal.SIGINT)
        note = following.stderr.read()
    assert following.returncode == 130
    hint = f"job {claim.job_id} continues. Follow it from here: qlora logs {claim.job_id} -f --after "
    assert note.startswith(hint)
    # An interrupt during a line may leave the line uncounted: then it is printed again, but no line is missed.
    assert int(note.removeprefix(hint)) in [event.seq for event in client.events(claim.job_id)]
    assert client.get(claim.job_id).status == "running"
    fail(queue, claim)


def test_logs_of_an_unknown_job_are_refused(run: Any) -> None:
    outcome = run("logs", "job_none")
    assert (outcome.code, outcome.stdout) == (1, "")
    assert "job_none" in outcome.stderr
