from __future__ import annotations

import pytest

from qlora_service.domain.tuned_models import job_id_in, tuned_model_name
from qlora_service.queue.queue import Queue
from qlora_service.store.database import Database
from qlora_service.store.jobs import get_job
from tests.control_plane import add_job


@pytest.mark.parametrize(
    ("name", "part"),
    [(None, ""), ("orders", "orders"), ("My Orders: v2!", "my-orders-v2"), ("Übung", "bung"), (":::", "")],
)
def test_model_name_contains_its_job_id(database: Database, queue: Queue, name: str | None, part: str) -> None:
    job_id = add_job(database, name=name)
    with database.read() as connection:
        assert tuned_model_name(get_job(connection, job_id)) is None
    claimed = queue.claim("worker")
    assert claimed is not None
    queue.succeed(claimed[0], {"attempt": 1})
    with database.read() as connection:
        model_name = tuned_model_name(get_job(connection, job_id))
    assert model_name == f"ft:tiny:local:{part}:{job_id[4:]}"
    assert job_id_in(model_name) == job_id


def test_model_name_contains_its_project(database: Database, queue: Queue) -> None:
    job_id = add_job(database, project="team-b", name="orders")
    claimed = queue.claim("worker")
    assert claimed is not None
    queue.succeed(claimed[0], {"attempt": 1})
    with database.read() as connection:
        assert tuned_model_name(get_job(connection, job_id)) == f"ft:tiny:team-b:orders:{job_id[4:]}"


@pytest.mark.parametrize(
    "name", ["tiny", "", "ft:a:b:c:d", "ft:a:b:c:" + "0" * 23, "ft:a:b:" + "0" * 22, "job_" + "0" * 22]
)
def test_invalid_model_name_has_no_job_id(name: str) -> None:
    assert job_id_in(name) is None
