"""File ids. A file is a view of a dataset, or of the metrics of a succeeded job: neither is stored twice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from qlora_service.errors import Conflict, NotFound

_FILE_ID = re.compile(r"file-([0-9a-f]{22})(-results)?")


def file_of_dataset(dataset_id: str) -> str:
    return f"file-{dataset_id.removeprefix('ds_')}"


def results_of_job(job_id: str) -> str:
    return f"file-{job_id.removeprefix('job_')}-results"


def dataset_of_file(file_id: str) -> str | None:
    """The id of the dataset that the file id refers to; None if it does not refer to a dataset."""
    match = _FILE_ID.fullmatch(file_id)
    return None if match is None or match[2] else f"ds_{match[1]}"


def job_of_results(file_id: str) -> str | None:
    """The id of the job whose results the file id refers to; None if it does not refer to results."""
    match = _FILE_ID.fullmatch(file_id)
    return f"job_{match[1]}" if match and match[2] else None


def sort_key(file_id: str) -> str | None:
    """The sortable part of a file id, which orders datasets and results by age; None if it is not a file id."""
    match = _FILE_ID.fullmatch(file_id)
    return match and match[1]


def file_not_found(file_id: str, location: str = "file_id") -> NotFound:
    return NotFound(f"there is no file {file_id[:100]!r}: POST it to /v1/files first", location=location)


@contextmanager
def file_errors(file_id: str) -> Iterator[None]:
    """Rewrites errors about a dataset or job to name the file id that the client sent."""
    try:
        yield
    except NotFound:
        raise file_not_found(file_id) from None
    except Conflict as error:
        if error.location == "dataset_id":
            error.message = error.message.replace(f"dataset {dataset_of_file(file_id)}", f"file {file_id}")
            error.location = "file_id"
        raise
