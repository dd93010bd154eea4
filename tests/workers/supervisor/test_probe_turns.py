"""Probes by real processes on a slot, between jobs and interrupted by them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from qlora_service.domain.clock import utc_now
from qlora_service.domain.jobs import JobStatus
from qlora_service.planning.time.job_times import TimeQuestion, job_time, request_probe
from qlora_service.specs import parse_spec
from qlora_service.store.database import Database
from qlora_service.store.probes import Probe, find_probe
from qlora_service.training.device import choose_device, device_name
from tests.workers.test_probe import WORK
from tests.workspace import Workspace, job_spec, processes_on
from workers.supervisor.probe_turns import ProbeTurns

LIMIT_S = 90.0


@pytest.fixture
def question(workspace: Workspace) -> TimeQuestion:
    return TimeQuestion(
        spec=parse_spec(job_spec()),
        base_weights_sha256=workspace.catalog.get("tiny").weights_sha256,
        work=WORK,
        micro_batch_tokens=128,
        checkpointing=False,
        longest_tokens=48,
        device=device_name(choose_device()),
        cuda=False,
    )


def open_database(workspace: Workspace) -> Database:
    return Database(workspace.settings.resolved_database_url)


def add_probe(workspace: Workspace, question: TimeQuestion) -> None:
    database = open_database(workspace)
    with database.write() as connection:
        request_probe(connection, question, utc_now())
    database.close()


def stored_probe(workspace: Workspace, question: TimeQuestion) -> Probe:
    database = open_database(workspace)
    with database.read() as connection:
        probe = find_probe(connection, question.probe_key())
    database.close()
    assert probe is not None
    return probe


def time_of(workspace: Workspace, question: TimeQuestion) -> dict[str, Any]:
    database = open_database(workspace)
    with database.read() as connection:
        estimate = job_time(connection, question)
    database.close()
    return estimate


def probe_pids(workspace: Workspace) -> list[int]:
    running = processes_on(workspace.settings.data_dir)
    return [pid for pid, command in running.items() if "workers.probe" in command]


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_free_slot_times_the_step_and_a_job_interrupts_it(workspace: Workspace, question: TimeQuestion) -> None:
    assert "request a probe" in time_of(workspace, question)["reason"]
    add_probe(workspace, question)
    assert "will be timed" in time_of(workspace, question)["reason"]
    with workspace.worker(QLORA_WARM_S="0"):
        wait_until(lambda: probe_pids(workspace))
        job_id = workspace.submit(max_steps=1, micro_batch_tokens=128)
        job = workspace.wait(job_id, lambda job: job.status is not JobStatus.QUEUED)
        assert stored_probe(workspace, question).result is None
        assert not probe_pids(workspace)
        assert workspace.wait_for_end(job.id).status is JobStatus.SUCCEEDED
        wait_until(lambda: stored_probe(workspace, question).result)
    result = stored_probe(workspace, question).result
    assert result is not None
    assert "error" not in result
    estimate = time_of(workspace, question)
    assert estimate["basis"] == "probe"
    assert estimate["phases"]["training"] == pytest.approx(WORK.tokens / result["tokens_per_second"], abs=0.01)
    assert {"starting", "publishing"} <= estimate["phases"].keys()  # measured with the job on this base


class Slot:
    """A slot's thread that runs one probe turn, in this process."""

    def __init__(self, workspace: Workspace) -> None:
        self.database, self.stop = open_database(workspace), threading.Event()
        self.results: list[bool] = []
        self.emptied = 0
        self._turns = ProbeTurns(
            self.database,
            slot="cpu-0",
            device="cpu",
            environment=os.environ | {"QLORA_DATA_DIR": str(workspace.settings.data_dir), "OMP_NUM_THREADS": "1"},
            log_dir=workspace.settings.data_dir,
            max_running=None,
        )
        self._lock = os.open(os.devnull, os.O_RDONLY)
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self.results.append(self._turns.run_next("host:cpu-0", self._lock, self.stop, self._empty_slot))

    def _empty_slot(self) -> None:
        self.emptied += 1

    def __enter__(self) -> Slot:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join(LIMIT_S)
        self.database.close()
        os.close(self._lock)


def test_slot_is_not_emptied_without_a_probe(workspace: Workspace) -> None:
    with Slot(workspace) as slot:
        pass
    assert (slot.results, slot.emptied) == ([False], 0)


def test_probe_that_dies_is_not_repeated(workspace: Workspace, question: TimeQuestion) -> None:
    add_probe(workspace, question)
    with Slot(workspace) as slot:
        wait_until(lambda: probe_pids(workspace))
        os.kill(probe_pids(workspace)[0], signal.SIGKILL)
        wait_until(lambda: slot.results)
    assert (slot.results, slot.emptied) == ([True], 1)
    result = stored_probe(workspace, question).result
    assert result is not None
    assert "exit code -9" in result["error"]
    assert "could not be timed" in time_of(workspace, question)["reason"]


def test_stopped_worker_leaves_the_probe_to_the_next_worker(workspace: Workspace, question: TimeQuestion) -> None:
    add_probe(workspace, question)
    with Slot(workspace):
        wait_until(lambda: probe_pids(workspace))
    assert not probe_pids(workspace)
    assert stored_probe(workspace, question).result is None
    with Slot(workspace):
        wait_until(lambda: probe_pids(workspace))
