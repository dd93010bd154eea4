"""Files' ids. A file is a dataset, or the metrics of a job that has succeeded: neither is stored a second time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from qlora_service.errors import Conflict, NotFound

_OWN_PART = re.compile(r"file-([0-9a-f]{22})(-results)?")


def file_of_dataset(dataset_id: str) -> str:
    return f"file-{dataset_id.removeprefix('ds_')}"


def results_of_job(job_id: str) -> str:
    return f"file-{job_id.removeprefix('job_')}-results"


def dataset_of_file(file_id: str) -> str | None:
    """The id of the dataset that is this file; None if it is none."""
    match = _OWN_PART.fullmatch(file_id)
    return None if match is None or match[2] else f"ds_{match[1]}"


def job_of_results(file_id: str) -> str | None:
    """The id of the job whose results are this file; None if it is none."""
    match = _OWN_PART.fullmatch(file_id)
    return f"job_{match[1]}" if match and match[2] else None


def own_part(file_id: str) -> str | None:
    """What orders files by age, whichever they are; None if it is no file's id."""
    match = _OWN_PART.fullmatch(file_id)
    return match and match[1]


def no_file(file_id: str, location: str = "file_id") -> NotFound:
    return NotFound(f"there is no file {file_id[:100]!r}: POST it to /v1/files first", location=location)


@contextmanager
def asked_for(file_id: str) -> Iterator[None]:
    """What a dataset or a job has against it is said of the file that the client knows."""
    try:
        yield
    except NotFound:
        raise no_file(file_id) from None
    except Conflict as error:
        if error.location == "dataset_id":
            error.message = error.message.replace(f"dataset {dataset_of_file(file_id)}", f"file {file_id}")
            error.location = "file_id"
        raise
