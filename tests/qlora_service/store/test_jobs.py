from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from qlora_service.domain.ids import new_id
from qlora_service.domain.jobs import Job, JobStatus
from qlora_service.errors import NotFound
from qlora_service.queue.claim import Progress
from qlora_service.queue.queue import Queue
from qlora_service.queue.requests import request_cancel, request_pause, request_resume
from qlora_service.specs import JobSpec, parse_spec
from qlora_service.store.database import Database
from qlora_service.store.jobs import (
    count_ahead,
    events_after,
    events_before,
    get_job,
    insert_job,
    list_jobs,
    list_published,
    mark_withdrawn,
    places_in_queue,
    unfinished_on,
)
from qlora_service.store.pages import PageRequest
from qlora_service.store.tables import jobs
from tests.control_plane import START, add_job, stored_rows

SPEC = {
    "base_model": "tiny",
    "adapter": {"target_modules": ["q_proj"], "r": 4},
    "training": {"max_steps": 3},
    "metadata": {"who": "å"},
    "priority": 7,
}


def listed(
    connection: Connection,
    *,
    limit: int,
    before: str | None = None,
    after: str | None = None,
    oldest_first: bool = False,
    **filters: Any,
) -> list[Job]:
    page = PageRequest(limit, before, after, oldest_first)
    return list_jobs(connection, page, project="local", **filters)


def test_new_job_is_returned_as_it_was_stored(database: Database) -> None:
    job_id = add_job(database, **{key: value for key, value in SPEC.items() if key != "base_model"})
    with database.read() as connection:
        job = get_job(connection, job_id)
    assert job.spec == parse_spec(SPEC)
    assert (job.id, job.status, job.created_at) == (job_id, JobStatus.QUEUED, START)
    assert (job.started_at, job.finished_at, job.error, job.result, job.phase) == (None, None, None, None, None)
    assert (job.attempt, job.step, job.metrics, job.stop_request) == (0, 0, {}, None)
    assert (job.project, job.hold, job.plan, job.deaths, job.checkpoint_step) == ("local", None, None, [], 0)
    assert job.warnings == []


def test_text_prompts_of_a_job_from_before_prompt_formats_stay_plain(database: Database) -> None:
    job_id = add_job(database)
    stored = {**SPEC, "training": {"max_steps": 3}}
    with database.write() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(spec=stored))
    with database.read() as connection:
        training = get_job(connection, job_id).spec.training
    assert (training.prompt_format, training.max_steps) == ("plain", 3)


def test_unknown_job_is_not_found(database: Database) -> None:
    with database.read() as connection, pytest.raises(NotFound, match="job_none") as caught:
        get_job(connection, "job_none")
    assert caught.value.location == "job_id"


def test_job_on_an_unknown_dataset_is_not_stored(database: Database) -> None:
    with pytest.raises(IntegrityError), database.write() as connection:
        insert_job(connection, new_id("job"), "local", JobSpec(base_model="tiny"), "ds_none", "0" * 64, START)
    assert not any(stored_rows(database).values())


def test_pages_go_from_the_newest_to_the_oldest_without_gaps(database: Database) -> None:
    ids = sorted((add_job(database) for _ in range(7)), reverse=True)
    seen: list[str] = []
    with database.read() as connection:
        while page := listed(connection, before=seen[-1] if seen else None, limit=3):
            assert len(page) <= 3
            seen += [job.id for job in page]
    assert seen == ids


def test_jobs_are_listed_by_status_and_base_model(database: Database, queue: Queue) -> None:
    queued, other = add_job(database), add_job(database, base_model="other")
    running = add_job(database, priority=1)
    queue.claim("host:1:0")
    with database.read() as connection:
        assert [job.id for job in listed(connection, status=JobStatus.RUNNING, limit=9)] == [running]
        assert [job.id for job in listed(connection, base_model="other", limit=9)] == [other]
        both = listed(connection, status=JobStatus.QUEUED, base_model="tiny", limit=9)
        assert [job.id for job in both] == [queued]
        assert listed(connection, status=JobStatus.FAILED, limit=9) == []


def test_count_ahead_is_the_number_of_claims_before_it(database: Database, queue: Queue) -> None:
    for priority in (0, 3, 0, -2, 3, 0):
        add_job(database, priority=priority)
    queue.claim("host:1:0")  # running jobs do not count
    with database.read() as connection:
        all_jobs = listed(connection, limit=9)
        expected = {job.id: count_ahead(connection, job) for job in all_jobs if not job.attempt}
        assert places_in_queue(connection, [job.id for job in all_jobs]) == expected
        first = next(iter(expected))
        assert places_in_queue(connection, [first]) == {first: expected[first]}
    order = []
    while (claimed := queue.claim("host:1:0")) is not None:
        order.append(claimed[0].job_id)
    assert expected == {job_id: place for place, job_id in enumerate(order)}


def test_events_are_read_after_a_sequence_number(database: Database, queue: Queue) -> None:
    add_job(database)
    add_job(database)
    claimed = queue.claim("host:1:0")
    assert claimed is not None
    claim, _ = claimed
    for step in range(4):
        queue.report(claim, Progress(step=step), ("metrics", {"step": step}))
    with database.read() as connection:
        all_events = events_after(connection, claim.job_id)
        first = events_after(connection, claim.job_id, limit=2)
        rest = events_after(connection, claim.job_id, first[-1].seq)
        assert [*first, *rest] == all_events
        assert {event.job_id for event in all_events} == {claim.job_id}
        steps = events_after(connection, claim.job_id, types=("metrics",))
    assert [event.data["step"] for event in steps] == [0, 1, 2, 3]


def test_another_projects_job_gives_the_same_error_as_an_unknown_one(database: Database) -> None:
    own, foreign = add_job(database), add_job(database, project="other")
    with database.read() as connection:
        assert get_job(connection, own, project="local").project == "local"
        with pytest.raises(NotFound) as foreign_error:
            get_job(connection, foreign, project="local")
        with pytest.raises(NotFound) as missing_error:
            get_job(connection, "job_none", project="local")
        assert [job.id for job in list_jobs(connection, PageRequest(9), project="other")] == [foreign]
    assert str(foreign_error.value).replace(foreign, "job_none") == str(missing_error.value)


@pytest.mark.parametrize(
    ("stored", "name", "metadata"),
    [
        ({"name": "old", "metadata": {"who": "å"}, "adapter": {"method": "future"}}, "old", {"who": "å"}),
        ({"base_model": "tiny", "training": {"max_steps": -1}}, None, {}),
        ({"name": 1, "metadata": [1]}, None, {}),
        ([1], None, {}),
    ],
)
def test_job_with_an_unreadable_spec_can_still_be_read_and_ended(
    database: Database, queue: Queue, stored: object, name: str | None, metadata: dict[str, str]
) -> None:
    unreadable, other = add_job(database, priority=7), add_job(database)
    with database.write() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.id == unreadable).values(spec=stored))
    with database.read() as connection:
        job = get_job(connection, unreadable)
        assert listed(connection, limit=9) == [get_job(connection, other), job]
    assert unreadable in (job.unreadable or "")
    assert "post it again" in (job.unreadable or "")
    assert (job.spec.base_model, job.spec.name, job.spec.metadata, job.spec.priority) == ("tiny", name, metadata, 7)
    with database.write() as connection:
        assert request_pause(connection, unreadable, START).status is JobStatus.PAUSED
        assert request_resume(connection, unreadable, START).status is JobStatus.QUEUED
        assert request_cancel(connection, unreadable, START).status is JobStatus.CANCELLED


@pytest.mark.parametrize("key", ["who", 'a"b', "x.y", "k[0]", "$", "ü\\", "a,b}", "'"])
def test_jobs_are_listed_by_any_metadata(database: Database, key: str) -> None:
    matching = add_job(database, metadata={key: "å'\"", "n": "1"})
    add_job(database, metadata={key: "other", "n": "1"})
    plain = add_job(database)
    with database.read() as connection:
        select = partial(listed, connection, limit=9)
        assert [job.id for job in select(metadata={key: "å'\""})] == [matching]
        assert [job.id for job in select(metadata={key: "å'\"", "n": "1"})] == [matching]
        assert select(metadata={key: "å'\"", "n": "2"}) == select(metadata={f"{key}x": "å'\""}) == []
        assert [job.id for job in select(metadata={})] == [plain]
        assert len(select()) == 3


def test_jobs_are_listed_from_the_oldest_on_request(database: Database) -> None:
    ids = sorted(add_job(database) for _ in range(4))
    with database.read() as connection:
        assert [job.id for job in listed(connection, oldest_first=True, after=ids[0], limit=2)] == ids[1:3]


def test_a_dataset_is_needed_until_every_job_on_it_has_ended(database: Database, queue: Queue) -> None:
    training = add_job(database)
    validating = add_job(database, project="other", validation={"dataset_id": "ds_validation"})
    with database.write() as connection:
        dataset_id = get_job(connection, training).dataset_id
        assert unfinished_on(connection, dataset_id) == training
        assert unfinished_on(connection, "ds_validation") == validating
        for job_id in (training, validating):
            request_cancel(connection, job_id, START)
        assert unfinished_on(connection, dataset_id) is unfinished_on(connection, "ds_validation") is None


def test_events_are_paged_from_the_newest(database: Database, queue: Queue) -> None:
    job_id = add_job(database)
    add_job(database, priority=-1)
    claimed = queue.claim("worker")
    assert claimed is not None
    queue.report(claimed[0], Progress(), ("log", {"message": "hello"}))
    with database.read() as connection:
        before = partial(events_before, connection, job_id, types=("status", "log"), limit=2)
        newest = before(None)
        assert [event.type for event in newest] == ["log", "status"]
        assert [event.data["status"] for event in before(newest[-1].seq)] == ["queued"]
        assert [event.type for event in before(None, types=("log",))] == ["log"]


def test_withdrawn_adapters_are_not_listed_as_published(database: Database, queue: Queue) -> None:
    ids = [add_job(database) for _ in range(3)]
    for _ in ids[:2]:
        claimed = queue.claim("worker")
        assert claimed is not None
        queue.succeed(claimed[0], {"attempt": 1})
    with database.write() as connection:
        mark_withdrawn(connection, ids[0], START)
        assert [job.id for job in list_published(connection, project="local", limit=9)] == [ids[1]]
        assert list_published(connection, project="other", limit=9) == []
        assert get_job(connection, ids[0]).withdrawn_at == START
