from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from qlora_service.models.base.needed_base import NeededBase, may_change_base
from qlora_service.queue.queue import Queue
from qlora_service.queue.scheduling import LOOK_AHEAD, MAX_OVERTAKEN
from qlora_service.specs import JobSpec, Lora, Quantization
from qlora_service.store.database import Database
from qlora_service.store.tables import jobs
from tests.control_plane import LEASE_S, SteppedClock, add_job, claim_next, run_in_processes

WEIGHTS = "0" * 64
OTHER: dict[str, Any] = {"quantization": {"type": "fp4"}}
WARM = NeededBase(WEIGHTS, Quantization())

CLAIM_ALL = """
import os
from qlora_service.models.base.needed_base import NeededBase
from qlora_service.queue.queue import Queue
from qlora_service.specs import Quantization
from qlora_service.store.database import Database

def work(url):
    queue, done = Queue(Database(url), lease_s=600), []
    warm = NeededBase("0" * 64, Quantization(type=("nf4", "fp4", "int8")[os.getpid() % 3]))
    while claimed := queue.claim("worker", warm):
        done.append(claimed[0].job_id)
    return done
"""


def claim_warm(queue: Queue, warm: NeededBase = WARM) -> str | None:
    claimed = queue.claim("host:1:0", warm)
    return None if claimed is None else claimed[0].job_id


def overtaken(database: Database) -> dict[str, int]:
    with database.read() as connection:
        return {row.id: row.overtaken for row in connection.execute(sa.select(jobs.c.id, jobs.c.overtaken))}


def test_a_job_for_the_loaded_base_is_claimed_before_an_older_one(queue: Queue, database: Database) -> None:
    first, second, third = add_job(database, **OTHER), add_job(database, **OTHER), add_job(database)
    younger = add_job(database)
    assert claim_warm(queue) == third
    assert overtaken(database) == {first: 1, second: 1, third: 0, younger: 0}


def test_without_a_loaded_base_the_oldest_is_claimed(queue: Queue, database: Database) -> None:
    first, _ = add_job(database, **OTHER), add_job(database)
    assert claim_next(queue).job_id == first
    assert set(overtaken(database).values()) == {0}


def test_the_oldest_is_claimed_where_none_runs_on_the_loaded_base(queue: Queue, database: Database) -> None:
    first, _ = add_job(database, **OTHER), add_job(database, quantization={"double_quant": False})
    assert claim_warm(queue) == first
    assert claim_warm(queue, NeededBase("1" * 64, Quantization(double_quant=False))) is not None
    assert claim_warm(queue) is None
    assert set(overtaken(database).values()) == {0}


def test_a_job_with_a_higher_priority_is_claimed_first_on_any_base(queue: Queue, database: Database) -> None:
    add_job(database)
    higher = add_job(database, priority=1, **OTHER)
    assert claim_warm(queue) == higher


def test_no_job_is_overtaken_more_often_than_allowed(queue: Queue, database: Database) -> None:
    cold = add_job(database, **OTHER)
    warm = [add_job(database) for _ in range(MAX_OVERTAKEN + 2)]
    claimed = [claim_warm(queue) for _ in range(MAX_OVERTAKEN + 2)]
    assert claimed == [*warm[:MAX_OVERTAKEN], cold, warm[MAX_OVERTAKEN]]


def test_a_job_at_the_starvation_bound_delays_only_the_jobs_after_it(queue: Queue, database: Database) -> None:
    add_job(database, **OTHER)
    warm = add_job(database)
    starved = add_job(database, **OTHER)
    with database.write() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.id == starved).values(overtaken=MAX_OVERTAKEN))
    assert claim_warm(queue) == warm


def test_a_job_that_may_not_run_yet_is_not_overtaken(database: Database, clock: SteppedClock) -> None:
    queue = Queue(database, lease_s=LEASE_S, clock=clock, leases=clock.lease_clock, max_running=1)
    running = add_job(database, project="busy")
    assert claim_warm(queue) == running
    limited, free, warm = add_job(database, project="busy", **OTHER), add_job(database, **OTHER), add_job(database)
    assert claim_warm(queue) == warm
    assert overtaken(database) == {running: 0, limited: 0, free: 1, warm: 0}


def test_a_job_that_needs_a_process_of_its_own_is_not_preferred(queue: Queue, database: Database) -> None:
    first = add_job(database, **OTHER)
    add_job(database, adapter={"trainable_token_indices": [3]})
    assert claim_warm(queue) == first


def test_only_the_front_of_the_queue_is_searched_for_the_loaded_base(queue: Queue, database: Database) -> None:
    first, *_ = [add_job(database, **OTHER) for _ in range(LOOK_AHEAD)]
    add_job(database)
    assert claim_warm(queue) == first


def test_a_job_that_cannot_be_read_is_overtaken_until_it_is_the_oldest(queue: Queue, database: Database) -> None:
    unreadable, warm = add_job(database), add_job(database)
    with database.write() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.id == unreadable).values(spec={"adapter": 7}))
    assert claim_warm(queue) == warm
    assert claim_warm(queue) is None
    assert overtaken(database)[unreadable] == 1


def test_a_released_job_keeps_its_count_of_overtakings(queue: Queue, database: Database) -> None:
    cold, warm = add_job(database, **OTHER), add_job(database)
    claim_warm(queue)
    claim = claim_next(queue)
    queue.release(claim, "the worker was stopped")
    assert overtaken(database) == {cold: 1, warm: 0}


@pytest.mark.slow
def test_workers_with_different_bases_starve_no_job_and_claim_each_once(database: Database) -> None:
    ids = [add_job(database, quantization={"type": ("nf4", "fp4", "int8")[n % 3]}) for n in range(60)]
    claimed = run_in_processes(CLAIM_ALL, database.url, processes=4)
    assert sorted(job_id for share in claimed for job_id in share) == sorted(ids)
    assert 0 < max(overtaken(database).values()) <= MAX_OVERTAKEN


@pytest.mark.parametrize(
    ("adapter", "changes"),
    [
        (Lora(), False),
        (Lora(use_dora=True), False),
        (Lora(trainable_token_indices=[3]), True),
        (Lora(init_lora_weights="olora"), True),
        (JobSpec.model_validate({"base_model": "x", "adapter": {"method": "ia3"}}).adapter, False),
    ],
)
def test_adapters_that_change_base_weights_need_a_process_of_their_own(adapter: Any, changes: bool) -> None:
    assert may_change_base(adapter) is changes


def test_a_needed_base_survives_serialization() -> None:
    base = NeededBase(WEIGHTS, Quantization(type="int8", compute_dtype="float32"))
    assert NeededBase.from_json(base.as_json()) == base
