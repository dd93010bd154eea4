"""How long chats may have a slot, as times are given; and real processes that end, however their supervisor does."""

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
from workers.supervisor.inference_turns import DRAIN_SHARE, PRESSED_S, UNANSWERED_S, ChatRules, ChatTurns, Stay, Verdict

__all__ = ["database"]

RULES = ChatRules(idle_s=300.0, hold_s=60.0, preempts=False, hang_s=300.0, max_running=None)
PREEMPTS = ChatRules(idle_s=300.0, hold_s=60.0, preempts=True, hang_s=300.0, max_running=None)


def status(**changes: Any) -> Status:
    known: dict[str, Any] = {"loading": False, "busy": False, "in_line": 0, "served": 1, "quiet_s": 0.0}
    return Status(**known | changes)


IDLE, BUSY = status(), status(busy=True)
LOADING = status(loading=True, served=0)


class Watched:
    """A process whose supervisor looks at it every second."""

    def __init__(self, rules: ChatRules = RULES) -> None:
        self.now = 0.0
        self.stay = Stay(rules, self.now)

    def look(
        self, seen: Status | None, seconds: float = 1.0, *, job_waits: bool = False, other_waits: bool = False
    ) -> Verdict:
        """The last verdict, after `seconds` in which it was always the same; one that is not "stay" ends them."""
        for _ in range(round(seconds)):
            self.now += 1.0
            verdict = self.stay.judge(self.now, seen, job_waits=job_waits, other_waits=other_waits)
            if verdict != "stay":
                return verdict
        return "stay"


def test_it_leaves_when_nobody_has_chatted_for_long() -> None:
    watched = Watched()
    assert watched.look(status(quiet_s=299.0)) == "stay"
    assert watched.look(status(quiet_s=300.0)) == "leave"
    assert watched.look(status(quiet_s=300.0, busy=True)) == "stay"
    assert watched.look(status(quiet_s=300.0, in_line=1)) == "stay"


def test_jobs_come_first() -> None:
    assert Watched().look(IDLE, 3, job_waits=True) == "leave"
    assert Watched().look(LOADING, 3, job_waits=True) == "leave"


def test_a_job_that_another_slot_takes_at_once_ends_no_chat() -> None:
    watched = Watched()
    assert watched.look(IDLE, 1, job_waits=True) == "stay"
    assert watched.look(IDLE, 10) == "stay"
    assert watched.look(IDLE, 1, job_waits=True) == "stay"
    assert watched.stay.held_since is not None
    watched.look(IDLE)
    assert watched.stay.held_since is None


def test_what_was_begun_may_end_while_a_job_waits_but_not_for_ever() -> None:
    watched = Watched()
    assert watched.look(BUSY, 3, job_waits=True) == "leave"
    verdicts = [watched.look(BUSY, job_waits=True) for _ in range(70)]
    assert verdicts.index("end") == pytest.approx(RULES.hold_s, abs=3)


def test_a_chat_for_which_a_job_made_way_is_served_before_it_leaves() -> None:
    watched = Watched(PREEMPTS)
    assert watched.look(LOADING, 200, job_waits=True) == "stay"
    assert watched.look(status(busy=True, served=1), 10, job_waits=True) == "stay"
    assert watched.look(status(busy=True, served=2), 10, job_waits=True) == "stay"
    assert watched.look(IDLE, job_waits=True) == "leave"


def test_a_chat_that_nobody_waits_for_any_more_gives_the_slot_back() -> None:
    watched = Watched(PREEMPTS)
    watched.look(LOADING, 10, job_waits=True)
    assert watched.look(status(served=0), 2 + PRESSED_S, job_waits=True) == "leave"


def test_chats_do_not_hold_a_slot_against_a_job_for_ever() -> None:
    watched = Watched(PREEMPTS)
    watched.look(LOADING, 10, job_waits=True)
    loaded_at = watched.now
    assert watched.look(BUSY, 100, job_waits=True) == "leave"
    assert watched.now - loaded_at == pytest.approx(DRAIN_SHARE * PREEMPTS.hold_s, abs=3)
    while watched.look(BUSY, job_waits=True) != "end":
        assert watched.now - loaded_at < PREEMPTS.hold_s + 3


@pytest.mark.parametrize("rules", [RULES, PREEMPTS])
def test_another_base_gets_its_turn(rules: ChatRules) -> None:
    assert Watched(rules).look(IDLE, 3, other_waits=True) == "leave"
    watched = Watched(rules)
    assert watched.look(BUSY, 10, other_waits=True) == "stay"
    assert watched.look(BUSY, 40, other_waits=True) == "leave"


def test_a_process_that_does_not_answer_is_ended() -> None:
    watched = Watched()
    assert watched.look(None, UNANSWERED_S) == "stay"
    assert watched.look(IDLE) == "stay"
    assert watched.look(None, UNANSWERED_S) == "stay"
    assert watched.look(None, 1) == "end"


def test_a_process_without_progress_is_ended() -> None:
    assert Watched().look(status(busy=True, quiet_s=299.0)) == "stay"
    assert Watched().look(status(busy=True, quiet_s=301.0)) == "end"
    # A large base may take long to load.
    assert Watched().look(status(loading=True, quiet_s=301.0)) == "stay"
    assert Watched().look(status(loading=True, quiet_s=1801.0)) == "end"


@pytest.fixture
def turns(database: Database, tmp_path: Path) -> ChatTurns:
    """Chats that may interrupt jobs."""
    return ChatTurns(database, PREEMPTS, slot="cpu-0", catalog=Catalog(tmp_path / "models"), socket_dir=tmp_path)


def is_asked_to_make_way(database: Database, claim: Claim) -> bool:
    with database.read() as connection:
        return get_job(connection, claim.job_id).stop_request is StopRequest.PREEMPT


def claimed_job(database: Database) -> tuple[Queue, Claim]:
    add_job(database)
    queue = Queue(database, lease_s=60)
    claimed = queue.claim("w")
    assert claimed is not None
    return queue, claimed[0]


def ask_for_base(database: Database) -> None:
    with database.write() as connection:
        inference.ask_for(connection, TINY)


def test_a_job_is_asked_to_make_way_when_somebody_waits_and_the_base_comes_before_the_next_job(
    database: Database, turns: ChatTurns
) -> None:
    _, claim = claimed_job(database)
    turns.consider(claim, "w")
    assert not is_asked_to_make_way(database, claim)
    assert turns.first("w") is None
    ask_for_base(database)
    turns.consider(claim, "w")
    assert is_asked_to_make_way(database, claim)
    assert turns.first("w") == TINY
    assert turns.first("w") is None  # once


def test_a_job_that_chats_have_held_up_gets_its_share_first(database: Database, turns: ChatTurns) -> None:
    turns._owed_s = 0.2  # as `run` leaves it
    queue, claim = claimed_job(database)
    ask_for_base(database)
    turns.consider(claim, "w")
    time.sleep(0.3)
    turns.consider(claim, "w")
    assert not is_asked_to_make_way(database, claim)  # it has not got further by a step
    queue.report(claim, Progress(step=1))
    turns.consider(claim, "w")
    assert not is_asked_to_make_way(database, claim)  # nor trained for as long
    time.sleep(0.3)
    turns.consider(claim, "w")
    assert is_asked_to_make_way(database, claim)


class House:
    """A data directory whose workers are asked to load a base, as somebody who waits does."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._database = Database(workspace.settings.resolved_database_url)

    def close(self) -> None:
        self._database.close()

    def processes(self) -> list[int]:
        return chatting_on(self.workspace.settings.data_dir)

    def until(self, condition: Callable[[], object], limit_s: float = 20.0, *, asking: bool = False) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline
            if asking:
                with self._database.write() as connection:
                    inference.ask_for(connection, TINY)
            time.sleep(0.05)

    def start(self) -> int:
        """The process that some worker starts, which is loading."""
        self.until(self.processes, asking=True)
        (pid,) = self.processes()
        return pid

    def socket(self) -> str | None:
        with self._database.read() as connection:
            return inference.socket_of(connection, TINY)


@pytest.fixture
def house(tiny_model: Path, tmp_path: Path) -> Iterator[House]:
    house = House(Workspace(tmp_path / "data", tiny_model))
    yield house
    house.close()


def test_a_killed_worker_takes_the_process_along_and_the_next_one_is_asked(house: House) -> None:
    with house.workspace.worker() as worker:
        first = house.start()
        worker.kill()
        worker.wait()
        house.until(lambda: not house.processes(), limit_s=5)
    with house.workspace.worker():
        house.until(lambda: set(house.processes()) - {first}, asking=True)


def test_a_process_that_stands_still_does_not_keep_the_slot_of_a_killed_worker(house: House) -> None:
    with house.workspace.worker() as worker:
        pid = house.start()
        os.kill(pid, signal.SIGSTOP)
        worker.kill()
        worker.wait()
    assert house.processes() == [pid]
    with house.workspace.worker():
        house.until(lambda: pid not in house.processes(), limit_s=10)


def test_a_process_that_stands_still_is_killed_and_followed_by_another(house: House) -> None:
    with house.workspace.worker(QLORA_HANG_S="1"):
        pid = house.start()
        os.kill(pid, signal.SIGSTOP)
        house.until(lambda: set(house.processes()) - {pid} == set(house.processes()) != set(), asking=True)
    assert list(house.workspace.settings.inference_dir.iterdir()) == []


def test_a_stopped_worker_leaves_no_process_behind(house: House) -> None:
    with house.workspace.worker() as worker:
        house.start()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(8) == 0
    assert house.processes() == []
    assert house.socket() is None


def test_a_job_takes_the_slot_of_a_base_that_is_being_loaded(house: House) -> None:
    with house.workspace.worker():
        house.start()
        job_id = house.workspace.submit(max_steps=100_000)
        house.workspace.wait(job_id, lambda job: job.attempt == 1, limit_s=8)
        house.workspace.wait(job_id, lambda job: job.phase != "starting")
        assert house.processes() == []
