from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_service.actions.jobs import Submission
from qlora_service.actions.service import Service
from qlora_service.domain.jobs import Job, JobStatus, StopRequest
from qlora_service.errors import NotFound, QuotaExceeded
from qlora_service.queue.claim import Claim, Progress
from qlora_service.queue.queue import Queue
from qlora_service.specs import parse_spec
from qlora_service.store.database import Database
from qlora_service.store.idempotency import Once, Replay
from tests.control_plane import claim_next, stored_rows
from tests.qlora_service.actions._submissions import ROWS, job_request, submit


def test_queue_position_is_the_number_of_jobs_ahead(service: Service, queue: Queue) -> None:
    low = submit(service, dataset={"rows": ROWS}, priority=-1).job
    assert service.jobs.queue_position(low) == 0
    high = submit(service, dataset={"rows": ROWS}, priority=5).job
    assert (service.jobs.queue_position(low), service.jobs.queue_position(high)) == (1, 0)
    claim_next(queue)
    assert service.jobs.queue_position(low) == 0
    assert service.jobs.queue_position(service.jobs.get(high.id)) is None


def test_jobs_are_listed_newest_first(service: Service, running: Claim) -> None:
    later = submit(service, dataset={"rows": ROWS}).job
    assert [job.id for job in service.jobs.list_jobs()] == [later.id, running.job_id]
    assert [job.id for job in service.jobs.list_jobs(before=later.id)] == [running.job_id]
    assert [job.id for job in service.jobs.list_jobs(status=JobStatus.RUNNING, base_model="tiny")] == [running.job_id]
    assert service.jobs.list_jobs(base_model="other") == []


def test_events_are_read_after_a_sequence_number(service: Service, running: Claim) -> None:
    queued, started = service.jobs.events(running.job_id)
    assert service.jobs.events(running.job_id, after=queued.seq) == [started]
    assert service.jobs.events(running.job_id, limit=1) == [queued]
    with pytest.raises(NotFound, match="job_none"):
        service.jobs.events("job_none")


def record(queue: Queue, claim: Claim, step: int, kind: str = "metrics") -> dict[str, Any]:
    data = {"step": step, "attempt": claim.token}
    queue.report(claim, Progress(step=step), (kind, data))
    return data


def test_metrics_of_a_resumed_job_cover_all_attempts(service: Service, queue: Queue, running: Claim) -> None:
    first = [record(queue, running, 0, "evaluation"), *(record(queue, running, step) for step in (1, 2, 3, 4))]
    first.append(record(queue, running, 4, "evaluation"))
    queue.report(running, Progress(), ("log", {"message": "training", "attempt": running.token}))
    assert service.jobs.metrics(running.job_id) == first
    queue.release(running, "the worker was stopped")
    second = claim_next(queue)
    # Until the second attempt reports the step it resumes from, the first attempt's metrics stay.
    assert service.jobs.metrics(running.job_id) == first
    resumed = {"message": "resumed after step 2", "attempt": second.token, "resumed_from_step": 2}
    queue.report(second, Progress(), ("log", resumed))
    assert service.jobs.metrics(running.job_id) == first[:3]
    repeated = record(queue, second, 3)
    assert service.jobs.metrics(running.job_id) == [*first[:3], repeated]
    with pytest.raises(NotFound):
        service.jobs.metrics("job_none")


def test_metrics_of_a_repeated_step_replace_the_earlier_ones(service: Service, queue: Queue, running: Claim) -> None:
    record(queue, running, 0, "evaluation")
    record(queue, running, 1)
    queue.release(running, "the worker was stopped")
    second = claim_next(queue)
    records = [record(queue, second, 0, "evaluation"), record(queue, second, 1), record(queue, second, 1, "evaluation")]
    assert service.jobs.metrics(running.job_id) == records


def test_cancel_ends_a_queued_job_and_requests_the_stop_of_a_running_one(service: Service, running: Claim) -> None:
    queued = submit(service, dataset={"rows": ROWS}).job
    assert service.jobs.cancel(queued.id).status is JobStatus.CANCELLED
    assert service.jobs.cancel(running.job_id).stop_request is StopRequest.CANCEL


def test_paused_job_is_not_claimed_until_it_is_resumed(service: Service, queue: Queue) -> None:
    job_id = submit(service, dataset={"rows": ROWS}).job.id
    assert service.jobs.pause(job_id).status is JobStatus.PAUSED
    assert queue.claim("worker") is None
    resumed = service.jobs.resume(job_id)
    assert (resumed.job.status, resumed.queue_position) == (JobStatus.QUEUED, 0)
    assert claim_next(queue).job_id == job_id


@pytest.mark.parametrize("action", ["cancel", "pause", "resume"])
def test_unknown_job_is_not_found(service: Service, action: str) -> None:
    with pytest.raises(NotFound, match="job_none"):
        getattr(service.jobs, action)("job_none")


def test_submission_beyond_the_limit_of_queued_jobs_is_refused(
    make_service: Callable[..., Service], queue: Queue, stored_state: Callable[[], Any]
) -> None:
    limited = make_service(max_queued_jobs=1)
    submit(limited, dataset={"rows": ROWS})
    before = stored_state()
    with pytest.raises(QuotaExceeded, match=r"1 jobs are in the queue.*cancel one"):
        submit(limited, dataset={"rows": ROWS})
    assert stored_state() == before
    claim_next(queue)
    submit(limited, dataset={"rows": ROWS})


def test_repeated_submission_is_not_checked_again(
    service: Service, database: Database, tmp_path: Path, upload: Callable[..., Path]
) -> None:
    def answer(submission: Submission) -> dict[str, Any]:
        return {"id": submission.job.id}

    once = Once("k", "local", "f", answer)
    path = upload(ROWS)
    job = service.jobs.submit(parse_spec(job_request()), path, once=once).job
    before = stored_rows(database)
    path.unlink()  # reading it again would fail
    with pytest.raises(Replay) as caught:
        service.jobs.submit(parse_spec(job_request()), path, once=once)
    assert caught.value.answer == {"id": job.id}
    assert stored_rows(database) == before


def test_failed_request_stores_neither_its_key_nor_its_changes(
    service: Service, stored_state: Callable[[], Any]
) -> None:
    def fail(_: Job) -> dict[str, Any]:
        raise ZeroDivisionError

    job_id = submit(service, dataset={"rows": ROWS}).job.id
    before = stored_state()
    with pytest.raises(ZeroDivisionError):
        service.jobs.cancel(job_id, once=Once("k", "local", "f", fail))
    assert stored_state() == before
