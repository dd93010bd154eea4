"""The policy for chats on a slot, with given times; and real processes that end with their supervisor."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_service.chat.wire import Status
from qlora_service.domain.jobs import StopRequest
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.queue.claim import Claim, Progress
from qlora_service.queue.queue import Queue
from qlora_service.store import inference
from qlora_service.store.database import Database
from qlora_service.store.jobs import get_job
from tests.chat_process import TINY
from tests.control_plane import add_job, database
from tests.workspace import Workspace, chatting_on
from workers.supervisor.chat_turns import (
    CONTENTION_DELAY_S,
    DRAIN_SHARE,
    UNRESPONSIVE_S,
    ChatRules,
    ChatSlotPolicy,
    ChatTurns,
    Verdict,
)

__all__ = ["database"]

RULES = ChatRules(idle_s=300.0, hold_s=60.0, preempts=False, hang_s=300.0, max_running=None)
PREEMPTS = ChatRules(idle_s=300.0, hold_s=60.0, preempts=True, hang_s=300.0, max_running=None)


def status(**changes: Any) -> Status:
    values: dict[str, Any] = {"loading": False, "busy": False, "in_line": 0, "served": 1, "quiet_s": 0.0}
    return Status(**values | changes)


IDLE, BUSY = status(), status(busy=True)
LOADING = status(loading=True, served=0)


class PolledPolicy:
    """A policy that is consulted every second."""

    def __init__(self, rules: ChatRules = RULES) -> None:
        self.now = 0.0
        self.policy = ChatSlotPolicy(rules, self.now)

    def poll(
        self, status: Status | None, seconds: float = 1.0, *, job_waits: bool = False, other_waits: bool = False
    ) -> Verdict:
        """The first verdict other than "stay" within `seconds` of a constant status, else "stay"."""
        for _ in range(round(seconds)):
            self.now += 1.0
            verdict = self.policy.decide(self.now, status, job_waits=job_waits, other_waits=other_waits)
            if verdict != "stay":
                return verdict
        return "stay"


def test_an_idle_process_yields_after_the_idle_time() -> None:
    polled = PolledPolicy()
    assert polled.poll(status(quiet_s=299.0)) == "stay"
    assert polled.poll(status(quiet_s=300.0)) == "yield"
    assert polled.poll(status(quiet_s=300.0, busy=True)) == "stay"
    assert polled.poll(status(quiet_s=300.0, in_line=1)) == "stay"


def test_a_waiting_job_takes_the_slot() -> None:
    assert PolledPolicy().poll(IDLE, 3, job_waits=True) == "yield"
    assert PolledPolicy().poll(LOADING, 3, job_waits=True) == "yield"


def test_a_job_that_another_slot_takes_at_once_ends_no_chat() -> None:
    polled = PolledPolicy()
    assert polled.poll(IDLE, 1, job_waits=True) == "stay"
    assert polled.poll(IDLE, 10) == "stay"
    assert polled.poll(IDLE, 1, job_waits=True) == "stay"
    assert polled.policy.job_waiting_since is not None
    polled.poll(IDLE)
    assert polled.policy.job_waiting_since is None


def test_a_current_answer_may_finish_while_a_job_waits_but_only_for_the_hold_time() -> None:
    polled = PolledPolicy()
    assert polled.poll(BUSY, 3, job_waits=True) == "yield"
    verdicts = [polled.poll(BUSY, job_waits=True) for _ in range(70)]
    assert verdicts.index("kill") == pytest.approx(RULES.hold_s, abs=3)


def test_a_chat_that_preempted_a_job_is_served_before_the_process_yields() -> None:
    polled = PolledPolicy(PREEMPTS)
    assert polled.poll(LOADING, 200, job_waits=True) == "stay"
    assert polled.poll(status(busy=True, served=1), 10, job_waits=True) == "stay"
    assert polled.poll(status(busy=True, served=2), 10, job_waits=True) == "stay"
    assert polled.poll(IDLE, job_waits=True) == "yield"


def test_a_process_without_any_request_left_yields_the_slot() -> None:
    polled = PolledPolicy(PREEMPTS)
    polled.poll(LOADING, 10, job_waits=True)
    assert polled.poll(status(served=0), 2 + CONTENTION_DELAY_S, job_waits=True) == "yield"


def test_chats_hold_a_slot_against_a_job_for_the_hold_time_only() -> None:
    polled = PolledPolicy(PREEMPTS)
    polled.poll(LOADING, 10, job_waits=True)
    loaded_at = polled.now
    assert polled.poll(BUSY, 100, job_waits=True) == "yield"
    assert polled.now - loaded_at == pytest.approx(DRAIN_SHARE * PREEMPTS.hold_s, abs=3)
    while polled.poll(BUSY, job_waits=True) != "kill":
        assert polled.now - loaded_at < PREEMPTS.hold_s + 3


@pytest.mark.parametrize("rules", [RULES, PREEMPTS])
def test_a_process_yields_to_another_base(rules: ChatRules) -> None:
    assert PolledPolicy(rules).poll(IDLE, 3, other_waits=True) == "yield"
    polled = PolledPolicy(rules)
    assert polled.poll(BUSY, 10, other_waits=True) == "stay"
    assert polled.poll(BUSY, 40, other_waits=True) == "yield"


def test_an_unresponsive_process_is_killed() -> None:
    polled = PolledPolicy()
    assert polled.poll(None, UNRESPONSIVE_S) == "stay"
    assert polled.poll(IDLE) == "stay"
    assert polled.poll(None, UNRESPONSIVE_S) == "stay"
    assert polled.poll(None, 1) == "kill"


def test_a_process_without_progress_is_killed() -> None:
    assert PolledPolicy().poll(status(busy=True, quiet_s=299.0)) == "stay"
    assert PolledPolicy().poll(status(busy=True, quiet_s=301.0)) == "kill"
    # A large base may take long to load.
    assert PolledPolicy().poll(status(loading=True, quiet_s=301.0)) == "stay"
    assert PolledPolicy().poll(status(loading=True, quiet_s=1801.0)) == "kill"


@pytest.fixture
def turns(database: Database, tmp_path: Path) -> ChatTurns:
    """Chats that may interrupt jobs."""
    return ChatTurns(database, PREEMPTS, slot="cpu-0", catalog=Catalog(tmp_path / "models"), socket_dir=tmp_path)


def is_preempted(database: Database, claim: Claim) -> bool:
    with database.read() as connection:
        return get_job(connection, claim.job_id).stop_request is StopRequest.PREEMPT


def claimed_job(database: Database) -> tuple[Queue, Claim]:
    add_job(database)
    queue = Queue(database, lease_s=60)
    claimed = queue.claim("w")
    assert claimed is not None
    return queue, claimed[0]


def request_base(database: Database) -> None:
    with database.write() as connection:
        inference.request_base(connection, TINY)


def test_a_waiting_client_preempts_the_job_and_its_base_is_loaded_before_the_next_job(
    database: Database, turns: ChatTurns
) -> None:
    _, claim = claimed_job(database)
    turns.consider_preemption(claim, "w")
    assert not is_preempted(database, claim)
    assert turns.base_after_preemption("w") is None
    request_base(database)
    turns.consider_preemption(claim, "w")
    assert is_preempted(database, claim)
    assert turns.base_after_preemption("w") == TINY
    assert turns.base_after_preemption("w") is None  # only once


def test_a_job_that_chats_delayed_trains_for_its_share_before_preemption(database: Database, turns: ChatTurns) -> None:
    turns._chat_held_s = 0.2  # as `run` sets it
    queue, claim = claimed_job(database)
    request_base(database)
    turns.consider_preemption(claim, "w")
    time.sleep(0.3)
    turns.consider_preemption(claim, "w")
    assert not is_preempted(database, claim)  # it has not completed a step
    queue.report(claim, Progress(step=1))
    turns.consider_preemption(claim, "w")
    assert not is_preempted(database, claim)  # it has not trained for long enough
    time.sleep(0.3)
    turns.consider_preemption(claim, "w")
    assert is_preempted(database, claim)


class ChatDemand:
    """A data directory whose workers a client asks to load a base."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._database = Database(workspace.settings.resolved_database_url)

    def close(self) -> None:
        self._database.close()

    def processes(self) -> list[int]:
        return chatting_on(self.workspace.settings.data_dir)

    def wait_until(self, condition: Callable[[], object], limit_s: float = 20.0, *, requesting: bool = False) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline
            if requesting:
                with self._database.write() as connection:
                    inference.request_base(connection, TINY)
            time.sleep(0.05)

    def start(self) -> int:
        """The pid of the process that a worker starts, which is loading the base."""
        self.wait_until(self.processes, requesting=True)
        (pid,) = self.processes()
        return pid

    def socket(self) -> str | None:
        with self._database.read() as connection:
            return inference.socket_of(connection, TINY)


@pytest.fixture
def demand(tiny_model: Path, tmp_path: Path) -> Iterator[ChatDemand]:
    demand = ChatDemand(Workspace(tmp_path / "data", tiny_model))
    yield demand
    demand.close()


def test_a_killed_worker_ends_the_process_and_the_next_worker_starts_another(demand: ChatDemand) -> None:
    with demand.workspace.worker() as worker:
        first = demand.start()
        worker.kill()
        worker.wait()
        demand.wait_until(lambda: not demand.processes(), limit_s=5)
    with demand.workspace.worker():
        demand.wait_until(lambda: set(demand.processes()) - {first}, requesting=True)


def test_a_stopped_process_does_not_keep_the_slot_of_a_killed_worker(demand: ChatDemand) -> None:
    with demand.workspace.worker() as worker:
        pid = demand.start()
        os.kill(pid, signal.SIGSTOP)
        worker.kill()
        worker.wait()
    assert demand.processes() == [pid]
    with demand.workspace.worker():
        demand.wait_until(lambda: pid not in demand.processes(), limit_s=10)


def test_a_stopped_process_is_killed_and_replaced(demand: ChatDemand) -> None:
    with demand.workspace.worker(QLORA_HANG_S="1"):
        pid = demand.start()
        os.kill(pid, signal.SIGSTOP)
        demand.wait_until(lambda: set(demand.processes()) - {pid} == set(demand.processes()) != set(), requesting=True)
    assert list(demand.workspace.settings.inference_dir.iterdir()) == []


def test_a_stopped_worker_leaves_no_process_behind(demand: ChatDemand) -> None:
    with demand.workspace.worker() as worker:
        demand.start()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(8) == 0
    assert demand.processes() == []
    assert demand.socket() is None


def test_a_job_takes_the_slot_of_a_base_that_is_being_loaded(demand: ChatDemand) -> None:
    with demand.workspace.worker():
        demand.start()
        job_id = demand.workspace.submit(max_steps=100_000)
        demand.workspace.wait(job_id, lambda job: job.attempt == 1, limit_s=8)
        demand.workspace.wait(job_id, lambda job: job.phase != "starting")
        assert demand.processes() == []
