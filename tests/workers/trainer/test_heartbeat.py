"""The heartbeat and the ends of a trainer that lost its claim or hangs, in real processes."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from typing import Any

import pytest

from qlora_service.domain.jobs import HoldReason, StopRequest
from qlora_service.errors import Interrupted, JobCancelled
from qlora_service.queue.claim import Claim
from qlora_service.queue.queue import Queue
from qlora_service.store.database import Database
from tests.control_plane import add_job
from tests.workspace import ROOT
from workers import exit_codes
from workers.trainer.heartbeat import Heartbeat

# A trainer without training: the heartbeat runs, and the main thread does the work of the test.
FRAME = """
import sys, time
from qlora_service.queue.queue import Queue
from qlora_service.queue.claim import Claim
from qlora_service.store.database import Database
from workers.trainer.heartbeat import Heartbeat

url, job_id, lease_s, hang_s = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
queue = Queue(Database(url), lease_s=lease_s)
heartbeat = Heartbeat(
    queue,
    Claim(job_id, 1),
    interval_s=0.1,
    lease_s=lease_s,
    hang_s=hang_s,
    free_disk_space=lambda: print("freed space", flush=True),
)
heartbeat.start()
print("started", flush=True)
def quickly():
    # Checks at short intervals; repeated if the machine was slow.
    while True:
        heartbeat.enter_phase()
        for _ in range(20):
            heartbeat.check()
            time.sleep(0.01)
        if heartbeat._longest_s < 0.1:
            return
def current_work():
    {work}
current_work()
"""


def start(database: Database, work: str, *, lease_s: float = 60, hang_s: float = 60) -> subprocess.Popen[str]:
    """A process that does `work` under a claim on the only job."""
    job_id = add_job(database)
    assert Queue(database, lease_s=lease_s).claim("worker") is not None
    process = launch(database, job_id, work, lease_s=lease_s, hang_s=hang_s)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


def launch(
    database: Database, job_id: str, work: str, *, lease_s: float = 60, hang_s: float = 60
) -> subprocess.Popen[str]:
    """A process that does `work` under the job's first claim, just started."""
    arguments = [database.url, job_id, str(lease_s), str(hang_s)]
    return subprocess.Popen(
        [sys.executable, "-c", FRAME.replace("{work}", work), *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stderr_at_end(process: subprocess.Popen[str], limit_s: float) -> str:
    assert process.stderr is not None
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        process.wait(limit_s)
        return process.stderr.read() + process.stdout.read()
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()


def test_a_hanging_attempt_exits_with_its_stack(database: Database) -> None:
    process = start(database, "quickly(); time.sleep(60)", hang_s=0.5)
    printed = stderr_at_end(process, 30)
    assert process.returncode == exit_codes.HUNG
    assert "current_work" in printed
    assert "trainer_hangs" in printed


def test_patience_follows_the_longest_interval_so_far(database: Database) -> None:
    # An interval of 0.2 s allows 4 s for the next check, instead of `hang_s`.
    work = (
        "[heartbeat.check() or time.sleep(0.2) for _ in range(12)]; time.sleep(1.2); heartbeat.check(); print('alive')"
    )
    process = start(database, work, hang_s=0.5)
    assert "alive" in stderr_at_end(process, 30)
    assert process.returncode == 0


def test_patience_is_longer_while_the_pace_is_unknown(database: Database) -> None:
    process = start(database, "time.sleep(1.5); heartbeat.check(); print('alive')", hang_s=1)
    assert "alive" in stderr_at_end(process, 30)
    assert process.returncode == 0


def test_each_phase_has_its_own_pace(database: Database) -> None:
    # The interval of 2 s would allow 40 s.
    process = start(database, "time.sleep(2); heartbeat.check(); quickly(); time.sleep(60)", hang_s=0.5)
    stderr_at_end(process, 30)
    assert process.returncode == exit_codes.HUNG


def test_a_trainer_that_renews_its_claim_outlives_its_first_lease(database: Database) -> None:
    process = start(database, "time.sleep(7); print('alive')", lease_s=6)
    assert "alive" in stderr_at_end(process, 30)
    assert process.returncode == 0


def test_a_trainer_without_a_database_logs_it_and_exits_before_its_lease_ends(database: Database) -> None:
    process = start(database, "time.sleep(60)", lease_s=8)
    time.sleep(0.5)  # a few renewals
    with database.write() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs RENAME TO away")
    printed = stderr_at_end(process, 30)
    assert process.returncode == exit_codes.NO_DATABASE
    assert "claim_not_renewed" in printed
    with database.write() as connection:
        connection.exec_driver_sql("ALTER TABLE away RENAME TO jobs")
    assert Queue(database, lease_s=8).requeue_lost() == []


def test_a_renewal_on_a_full_disk_frees_space_and_holds_the_job(database: Database) -> None:
    process = start(database, "[heartbeat.check() or time.sleep(0.05) for _ in iter(int, 1)]")
    with database.write() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER no_room BEFORE UPDATE ON jobs BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
        )
    printed = stderr_at_end(process, 30)
    assert "freed space" in printed
    assert "Interrupted: the disk is full" in printed


def test_a_process_that_holds_the_gil_does_not_outlive_its_lease(database: Database) -> None:
    # After a few renewals no Python thread runs, while the regular expression backtracks.
    process = start(database, "time.sleep(0.5); __import__('re').match(r'(a*)*b', 'a' * 40)", lease_s=8)
    printed = stderr_at_end(process, 30)
    assert process.returncode == 1
    assert "current_work" in printed
    assert Queue(database, lease_s=8).requeue_lost() == []


def test_a_trainer_that_cannot_renew_its_claim_exits_before_its_lease_ends(database: Database) -> None:
    process = start(database, "time.sleep(60)", lease_s=6)
    lock = sqlite3.connect(database.url.removeprefix("sqlite:///"), isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    began_at = time.monotonic()
    stderr_at_end(process, 30)
    lock.close()
    assert time.monotonic() - began_at < 6.0 + 0.5
    assert process.returncode != 0


def test_a_trainer_with_a_superseded_claim_exits(database: Database) -> None:
    process = start(database, "time.sleep(60)")
    queue = Queue(database, lease_s=60)
    queue.requeue_of("worker")
    queue.claim("another")
    stderr_at_end(process, 30)
    assert process.returncode == exit_codes.CLAIM_LOST


def test_a_trainer_whose_claim_was_lost_at_startup_begins_nothing(database: Database) -> None:
    job_id = add_job(database)
    queue = Queue(database, lease_s=60)
    queue.claim("worker")
    queue.requeue_of("worker")
    process = launch(database, job_id, "time.sleep(60)")
    assert "started" not in stderr_at_end(process, 30)
    assert process.returncode == exit_codes.CLAIM_LOST


def test_a_trainer_begins_with_a_whole_lease(database: Database) -> None:
    # Without the first renewal the lease would expire meanwhile.
    job_id = add_job(database)
    assert Queue(database, lease_s=1.5).claim("worker") is not None
    process = launch(database, job_id, "__import__('re').match(r'(a*)*b', 'a' * 40)", lease_s=8)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    stderr_at_end(process, 30)
    assert process.returncode == 1
    assert Queue(database, lease_s=8).requeue_lost() == []


@pytest.mark.parametrize(
    ("request_", "error", "hold"),
    [
        (StopRequest.CANCEL, JobCancelled, None),
        (StopRequest.PAUSE, Interrupted, HoldReason.USER),
        (StopRequest.PREEMPT, Interrupted, None),
    ],
)
def test_a_request_of_the_queue_is_raised_at_the_next_check(
    database: Database, request_: StopRequest, error: type[Exception], hold: str | None
) -> None:
    heartbeat = Heartbeat(Queue(database, lease_s=60), Claim("job_1", 1), interval_s=1, lease_s=60, hang_s=60)
    heartbeat.check()
    heartbeat.receive(request_)
    with pytest.raises(error) as raised:
        heartbeat.check()
    details: dict[str, Any] = getattr(raised.value, "details", {})
    assert details.get("hold") == hold


def test_a_withdrawn_pause_stops_nothing(database: Database) -> None:
    heartbeat = Heartbeat(Queue(database, lease_s=60), Claim("job_1", 1), interval_s=1, lease_s=60, hang_s=60)
    heartbeat.receive(StopRequest.PAUSE)
    heartbeat.receive(None)
    heartbeat.check()
    heartbeat.request_stop()
    with pytest.raises(Interrupted, match="worker was stopped"):
        heartbeat.check()


def test_every_exit_code_has_a_cause() -> None:
    numbers = [value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)]
    assert sorted(numbers) == sorted(exit_codes.CAUSES)
