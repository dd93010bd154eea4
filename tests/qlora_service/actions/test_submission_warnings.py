"""Warnings about a job that is queued all the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_service.actions.service import Service
from qlora_service.actions.submission import CheckedRows, submission_warnings
from qlora_service.data.rendering.report import VALIDATION_PREFIX, RenderReport
from qlora_service.domain.datasets import DatasetReport
from qlora_service.domain.row_warnings import RowWarning
from qlora_service.store.database import Database
from tests.control_plane import add_row_warning, job_events
from tests.qlora_service.actions._submissions import LONG, ROWS, submit


def test_usable_rows_give_no_warning(service: Service) -> None:
    assert submit(service, dataset={"rows": ROWS}).job.warnings == []


def test_rows_of_a_kind_are_one_warning_with_a_count_and_the_first_lines(
    service: Service, upload: Callable[..., Path]
) -> None:
    bad = [{"prompt": n, "completion": "x"} for n in range(12)] + [{"prompt": "a"}, {"prompt": "a", "completion": ""}]
    job = submit(service, upload([*ROWS, *bad])).job
    not_text, other_shape, empty = job.warnings
    assert not_text == "left out: 12 rows (line 21, 22, 23, 24, 25, … at /prompt): must be a string, is a number"
    assert other_shape.startswith("left out: 1 row (line 33): the keys of this row fit no shape.")
    assert empty == "left out: 1 row (line 34 at /completion): the answer is empty"
    assert service.jobs.get(job.id).warnings == job.warnings
    assert service.jobs.list_jobs()[0].warnings == job.warnings


def test_each_warning_of_a_submission_is_an_event(service: Service, database: Database) -> None:
    job = submit(service, dataset={"rows": [*ROWS, {"prompt": 1, "completion": "x"}, {"prompt": "a"}]}).job
    assert len(job.warnings) == 2
    assert [(event.type, event.data) for event in job_events(database, job.id)] == [
        ("status", {"status": "queued"}),
        *(("warning", {"message": warning}) for warning in job.warnings),
    ]


def test_dropped_and_truncated_rows_give_a_warning_with_their_lines(service: Service) -> None:
    rows = {"rows": [*ROWS, LONG, LONG]}
    (dropped,) = submit(service, dataset=rows, training={"too_long": "drop"}).job.warnings
    assert re.fullmatch(r"left out: 2 rows \(line 21, 22\): \d+ tokens long; max_seq_len_tokens is 128", dropped)
    (cut,) = submit(service, dataset=rows, training={"too_long": "truncate"}).job.warnings
    assert cut == "2 rows (line 21, 22): truncated to 128 tokens"


def test_rows_of_the_validation_dataset_give_warnings(service: Service, upload: Callable[..., Path]) -> None:
    validation = service.datasets.upload(upload([*ROWS[:3], {"prompt": 1, "completion": "x"}]), filename=None)
    job = submit(service, dataset={"rows": ROWS[3:]}, validation={"dataset_id": validation.id}).job
    assert job.warnings == [
        "validation dataset: left out: 1 row (line 4 at /prompt): must be a string, is a number",
    ]


def test_warning_from_reading_a_stored_dataset_is_one_of_the_job(
    service: Service, upload: Callable[..., Path], database: Database
) -> None:
    dataset = service.datasets.upload(upload(ROWS), filename=None)
    add_row_warning(database, dataset.id, RowWarning("`train` is false", "/train", 12, [1, 2, 3, 4, 5]))
    job = submit(service, dataset={"id": dataset.id}).job
    assert job.warnings == ["12 rows (line 1, 2, 3, 4, 5, … at /train): `train` is false"]


@pytest.mark.parametrize("prefix", ["", VALIDATION_PREFIX])
def test_warning_says_when_only_the_first_rows_were_rendered(prefix: str) -> None:
    read = DatasetReport("jsonl", "text", bytes=9, rows=9, usable_rows=9, finding_count=0, findings=())
    whole, first = (CheckedRows(read, RenderReport(rows=5, complete=complete)) for complete in (True, False))
    warnings = submission_warnings(*((whole, first) if prefix else (first, whole)))
    assert warnings == [f"{prefix}only the first 5 rows were rendered; the trainer checks the rest"]
