import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from qlora_service.actions.jobs import Submission
from qlora_service.actions.service import Service, Stores, open_service
from qlora_service.artifacts.manifest import Manifest, describe_file
from qlora_service.artifacts.store import ArtifactStore, dataset_key, job_key
from qlora_service.data.rendering.renderer import RenderRules
from qlora_service.domain.jobs import Job, JobStatus, StopRequest
from qlora_service.domain.tuned_models import tuned_model_name
from qlora_service.errors import (
    Conflict,
    InvalidDataset,
    InvalidModel,
    InvalidSpec,
    NotFound,
    QLoRAError,
    QuotaExceeded,
    Unavailable,
)
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.queue.claim import Claim, Progress
from qlora_service.queue.queue import Queue
from qlora_service.specs import parse_spec
from qlora_service.store.database import Database
from qlora_service.store.idempotency import Once, Replay
from qlora_service.store.tables import render_reports
from tests.control_plane import SteppedClock, claim_next, job_events, stored_rows
from tests.tiny_model import MAX_POSITIONS

ROWS = [{"prompt": f"What is {n} + {n}? ", "completion": f"It is {2 * n}."} for n in range(20)]
LONG = {"prompt": "once ", "completion": "upon a time " * 200}
MEDIUM = {"prompt": "once ", "completion": "a " * 200}
PNG = b"\x89PNG\r\n\x1a\n" + bytes(64)


@pytest.fixture(scope="module")
def catalog(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    catalog = Catalog(tmp_path_factory.mktemp("models"))
    catalog.import_model("tiny", tiny_model)
    return catalog


@pytest.fixture
def service(database: Database, queue: Queue, catalog: Catalog, clock: SteppedClock, tmp_path: Path) -> Service:
    artifacts = ArtifactStore((tmp_path / "artifacts").as_uri())
    return Service.of(
        Stores(database=database, artifacts=artifacts, catalog=catalog, tmp_dir=tmp_path / "tmp", clock=clock)
    )


@pytest.fixture
def upload(tmp_path: Path) -> Callable[[Any, str], Path]:
    """Writes a file of rows, or of the given bytes, as an API would."""

    def write(content: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else jsonl(content))
        return path

    return write


@pytest.fixture
def kept(database: Database, tmp_path: Path) -> Callable[[], Any]:
    """Everything the service keeps: rows, objects, scratch files."""

    def look() -> Any:
        files = {path for name in ("artifacts", "tmp") for path in (tmp_path / name).rglob("*")}
        return stored_rows(database), files

    return look


def jsonl(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def document(**groups: Any) -> dict[str, Any]:
    """A spec that the tiny model can take."""
    training = {"max_seq_len_tokens": 128, **groups.pop("training", {})}
    return {"base_model": "tiny", "training": training, **groups}


def submit(service: Service, upload: Path | None = None, **groups: Any) -> Submission:
    return service.jobs.submit(parse_spec(document(**groups)), upload, upload.name if upload else None)


# --- submitting


def test_inline_rows_become_a_dataset_and_a_queued_job(
    service: Service, database: Database, clock: SteppedClock, tmp_path: Path
) -> None:
    job = submit(service, dataset={"rows": ROWS}, name="sums", priority=3).job
    assert (job.status, job.created_at, job.spec.name, job.spec.priority) == (JobStatus.QUEUED, clock.now, "sums", 3)
    assert (job.spec.dataset.id, job.spec.dataset.rows) == (job.dataset_id, None)
    assert service.jobs.get(job.id) == job
    dataset = service.datasets.get(job.dataset_id)
    assert (dataset.report.rows, dataset.report.shape, dataset.filename) == (20, "prompt_completion", None)
    stored = (tmp_path / "artifacts" / dataset_key(dataset.sha256)).read_bytes()
    assert hashlib.sha256(stored).hexdigest() == dataset.sha256
    assert [json.loads(line) for line in stored.splitlines()] == ROWS
    assert [event.data for event in job_events(database, job.id)] == [{"status": "queued"}]


PAIRS = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No idea."} for n in range(20)]
LABELLED = [{"prompt": f"What is {n}?", "completion": f"It is {n}.", "label": n % 2 == 0} for n in range(20)]


@pytest.mark.parametrize(
    ("rows", "objective", "hint"),
    [
        (PAIRS, "supervised", '"dpo"'),
        (LABELLED, "supervised", '"kto"'),
        (ROWS, "dpo", "preference"),
        (PAIRS, "kto", '"dpo"'),
        (LABELLED, "orpo", '"kto"'),
    ],
)
def test_an_objective_that_does_not_fit_the_rows_is_refused_and_nothing_is_kept(
    service: Service, kept: Callable[[], Any], rows: list[dict[str, Any]], objective: str, hint: str
) -> None:
    before = kept()
    with pytest.raises(InvalidSpec, match=hint) as caught:
        submit(service, dataset={"rows": rows}, objective={"type": objective})
    assert caught.value.location == "/objective/type"
    assert kept() == before


@pytest.mark.parametrize(("rows", "objective"), [(PAIRS, "dpo"), (PAIRS, "orpo"), (LABELLED, "kto")])
def test_preference_rows_are_queued_under_their_objectives(
    service: Service, rows: list[dict[str, Any]], objective: str
) -> None:
    job = submit(service, dataset={"rows": rows}, objective={"type": objective}).job
    assert (job.status, job.spec.objective.type) == (JobStatus.QUEUED, objective)


def test_rows_of_any_language_survive(service: Service, tmp_path: Path) -> None:
    rows = [{"prompt": "你好 🌊 ", "completion": "ça va\u2028?\\n"}, {"prompt": "ñ", "completion": "\U0001f600"}]
    dataset = service.datasets.get(submit(service, dataset={"rows": rows}).job.dataset_id)
    stored = (tmp_path / "artifacts" / dataset_key(dataset.sha256)).read_bytes()
    assert [json.loads(line) for line in stored.split(b"\n") if line] == rows
    assert dataset.report.usable_rows == 2


def test_upload_is_stored_as_it_came(
    service: Service, upload: Callable[..., Path], tmp_path: Path, kept: Callable[[], Any]
) -> None:
    path = upload(ROWS)
    job = submit(service, path).job
    dataset = service.datasets.get(job.dataset_id)
    assert (dataset.filename, dataset.sha256) == ("rows.jsonl", describe_file(path).sha256)
    assert (tmp_path / "artifacts" / dataset_key(dataset.sha256)).read_bytes() == path.read_bytes()
    assert not any("tmp/" in str(file.relative_to(tmp_path)) for file in kept()[1])


def test_upload_is_read_as_the_spec_says(service: Service, upload: Callable[..., Path]) -> None:
    reading = {"container": "text", "shape": "text"}
    job = submit(service, upload(ROWS[:1], "a.jsonl"), dataset=reading, validation={"fraction": 0}).job
    report = service.datasets.get(job.dataset_id).report
    assert (report.container, report.shape) == ("text", "text")
    # The dataset knows how it is read; the stored spec need not say it again.
    assert job.spec.dataset.model_dump(exclude_none=True) == {"id": job.dataset_id}


def test_stored_dataset_serves_many_jobs(
    service: Service, upload: Callable[..., Path], database: Database, tmp_path: Path
) -> None:
    dataset = service.datasets.upload(upload(ROWS), filename="rows.jsonl")
    stored = tmp_path / "artifacts" / dataset_key(dataset.sha256)
    written_ns = stored.stat().st_mtime_ns
    jobs = [submit(service, dataset={"id": dataset.id}).job for _ in range(2)]
    assert {job.dataset_id for job in jobs} == {dataset.id}
    assert jobs[0].id != jobs[1].id
    # Read where it is, not written again.
    assert stored.stat().st_mtime_ns == written_ns
    assert len(stored_rows(database)["datasets"]) == 1


def test_same_content_is_the_same_dataset(service: Service, upload: Callable[..., Path], database: Database) -> None:
    first = service.datasets.upload(upload(ROWS, "a.jsonl"), filename="a.jsonl")
    assert service.datasets.upload(upload(ROWS, "b.jsonl"), filename="b.jsonl") == first
    assert submit(service, upload(ROWS, "c.jsonl")).job.dataset_id == first.id
    inline = {submit(service, dataset={"rows": ROWS[:5]}).job.dataset_id for _ in range(2)}
    assert len(inline) == 1
    assert service.datasets.list_datasets() == [service.datasets.get(inline.pop()), first]


def test_upload_heals_an_object_that_a_power_cut_tore(
    service: Service, upload: Callable[..., Path], tmp_path: Path
) -> None:
    path = upload(ROWS)
    dataset = service.datasets.upload(path, filename=None)
    stored = tmp_path / "artifacts" / dataset_key(dataset.sha256)
    stored.write_bytes(b"")
    service.datasets.upload(path, filename=None)
    assert stored.read_bytes() == path.read_bytes()


# --- warnings


def test_clean_rows_give_no_warning(service: Service) -> None:
    assert submit(service, dataset={"rows": ROWS}).warnings == ()


def test_unreadable_rows_are_told_with_a_dataset_that_exists(service: Service, upload: Callable[..., Path]) -> None:
    path = upload([*ROWS, {"prompt": 3, "completion": "x"}])
    # The second time the content is known, and its first id is the one to name.
    for submission in (submit(service, path), submit(service, path)):
        (warning,) = submission.warnings
        assert warning.startswith("1 rows of the upload are left out")
        service.datasets.get(warning.rsplit("/", 1)[-1])


def test_dropped_and_truncated_rows_are_told(service: Service) -> None:
    rows = {"rows": [*ROWS, LONG]}
    (dropped,) = submit(service, dataset=rows, training={"too_long": "drop"}).warnings
    assert dropped.startswith("1 rows are left out; the first: line 21: ")
    (cut,) = submit(service, dataset=rows, training={"too_long": "truncate"}).warnings
    assert cut == "1 rows are truncated to 128 tokens"


# --- refusing: what cannot work leaves nothing behind


@dataclass(frozen=True)
class BadInput:
    kind: type[QLoRAError]
    message: str
    location: str | None
    groups: dict[str, Any]
    upload: bytes | None = None
    filename: str = "rows.jsonl"
    line: int | None = None


BAD_INPUT = {
    "no dataset": BadInput(InvalidSpec, "no dataset: give one of", "/dataset", {}),
    "two datasets": BadInput(
        InvalidSpec, "more than one dataset", "/dataset", {"dataset": {"rows": ROWS}}, jsonl(ROWS)
    ),
    "unknown dataset": BadInput(
        NotFound, "there is no dataset 'ds_none'", "/dataset/id", {"dataset": {"id": "ds_none"}}
    ),
    "unknown base model": BadInput(
        InvalidModel, "there is no base model 'tinny': did you mean 'tiny'?", None,
        {"base_model": "tinny", "dataset": {"rows": ROWS}},
    ),
    "base model that is a path": BadInput(
        InvalidModel, "there is no base model", None, {"base_model": "../models/tiny", "dataset": {"rows": ROWS}}
    ),
    "limit beyond the model": BadInput(
        InvalidSpec, f"set it to {MAX_POSITIONS} or less", "/training/max_seq_len_tokens",
        {"dataset": {"rows": ROWS}, "training": {"max_seq_len_tokens": MAX_POSITIONS + 1}},
    ),
    "module the model lacks": BadInput(
        InvalidSpec, "tiny has no c_attn; its modules are down_proj,", "/adapter/target_modules",
        {"dataset": {"rows": ROWS}, "adapter": {"target_modules": ["q_proj", "c_attn"]}},
    ),
    "no rows": BadInput(InvalidDataset, "it has no rows", None, {"dataset": {"rows": []}}),
    "no usable row": BadInput(
        InvalidDataset, "cannot be used", None, {"dataset": {"rows": [{"question": "a"}, {"b": 1}]}}, line=1
    ),
    "no row of the named shape": BadInput(
        InvalidDataset, "none of its 20 rows is usable as alpaca", None,
        {"dataset": {"rows": ROWS, "shape": "alpaca"}}, line=1,
    ),
    "unpaired surrogate": BadInput(
        InvalidDataset, "an unpaired surrogate", None, {"dataset": {"rows": [{"text": "\ud800"}]}}, line=1
    ),
    "every row too long": BadInput(
        InvalidDataset, "all rows of the dataset are longer than max_seq_len_tokens = 128", "/dataset",
        {"dataset": {"rows": [LONG, LONG]}}, line=1,
    ),
    "every row too long to keep": BadInput(
        InvalidDataset, "tokens: set training.too_long to truncate", "/dataset",
        {"dataset": {"rows": [LONG, LONG]}, "training": {"too_long": "drop"}}, line=1,
    ),
    "one row too long": BadInput(
        InvalidDataset, "tokens: raise it to 204 to keep them whole, or set training.too_long to truncate or drop",
        "/dataset", {"dataset": {"rows": [*ROWS, MEDIUM]}}, line=21,
    ),
    "nothing to train after the cut": BadInput(
        InvalidDataset, "no row of the dataset can be trained on: line 1: nothing to train", "/dataset",
        {
            "dataset": {"rows": [{"prompt": "once upon " * 200, "completion": "a time"}] * 2},
            "training": {"too_long": "truncate"},
        },
        line=1,
    ),
    "one row and a share to hold out": BadInput(
        InvalidDataset, "set validation.fraction to 0", "/dataset", {"dataset": {"rows": ROWS[:1]}}
    ),
    "empty file": BadInput(InvalidDataset, "is empty", None, {}, b""),
    "image called JSON Lines": BadInput(InvalidDataset, "seems to be a PNG image", None, {}, PNG),
    "CSV called Parquet": BadInput(
        InvalidDataset, "as its name says", None, {}, b"prompt,completion\na,b\n", "rows.parquet"
    ),
    "JSON Lines called CSV": BadInput(InvalidDataset, "as its name says", None, {}, jsonl(ROWS), "rows.csv"),
    "damaged Parquet": BadInput(
        InvalidDataset, "arquet", None, {}, b"PAR1" + bytes(100) + b"PAR1", "rows.parquet"
    ),
    "lines that are no JSON": BadInput(
        InvalidDataset, "none of its rows can be read", None, {}, b'{"text": \n{"text"\n', line=1
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_and_leaves_nothing(
    service: Service, upload: Callable[..., Path], kept: Callable[[], Any], case: str
) -> None:
    bad = BAD_INPUT[case]
    path = None if bad.upload is None else upload(bad.upload, bad.filename)
    before = kept()
    with pytest.raises(bad.kind) as caught:
        submit(service, path, **bad.groups)
    assert type(caught.value) is bad.kind
    assert bad.message in caught.value.message
    assert caught.value.location == bad.location
    if bad.line is not None:
        assert caught.value.findings[0].line == bad.line
    assert kept() == before
    assert not any(before[0].values())


def test_refused_job_leaves_a_stored_dataset_as_it_was(
    service: Service, upload: Callable[..., Path], database: Database
) -> None:
    dataset = service.datasets.upload(upload([*ROWS, LONG]), filename=None)
    with pytest.raises(InvalidDataset, match="1 of 21 rows"):
        submit(service, dataset={"id": dataset.id})
    rows = stored_rows(database)
    assert (len(rows["datasets"]), rows["jobs"], rows["events"]) == (1, [], [])


def test_one_row_is_enough_when_none_is_held_out(service: Service) -> None:
    assert submit(service, dataset={"rows": ROWS[:1]}, validation={"fraction": 0}).job.status is JobStatus.QUEUED


def test_unusable_upload_to_the_datasets_leaves_nothing(
    service: Service, upload: Callable[..., Path], kept: Callable[[], Any]
) -> None:
    before = kept()
    with pytest.raises(InvalidDataset, match="PNG"):
        service.datasets.upload(upload(PNG, "a.csv"), filename="a.csv")
    assert kept() == before


# --- datasets under a base model


def test_lengths_are_rendered_once_and_then_remembered(
    service: Service, upload: Callable[..., Path], database: Database
) -> None:
    dataset = service.datasets.upload(upload([*ROWS, LONG]), filename=None)
    report = service.datasets.lengths(dataset.id, "tiny", RenderRules(128))
    assert (report.rows, report.usable_rows, report.too_long_rows, report.complete) == (21, 20, 1, True)
    assert sum(report.histogram.values()) == 21
    assert report.findings[0]["line"] == 21
    assert service.datasets.lengths(dataset.id, "tiny", RenderRules(128)) == report
    # A mark in the cache shows that it is read; other rules are another entry.
    with database.write() as connection:
        marked = {**connection.execute(sa.select(render_reports.c.report)).scalar_one(), "rows": 999}
        connection.execute(sa.update(render_reports).values(report=marked))
    assert service.datasets.lengths(dataset.id, "tiny", RenderRules(128)).rows == 999
    assert service.datasets.lengths(dataset.id, "tiny", RenderRules(127)).rows == 21


def test_preview_shows_the_tokens_and_which_are_trained(service: Service, upload: Callable[..., Path]) -> None:
    dataset = service.datasets.upload(upload([*ROWS, LONG]), filename=None)
    first, second = service.datasets.preview(dataset.id, "tiny", RenderRules(128), skip=3, limit=2)
    assert (first["line"], second["line"]) == (4, 5)
    assert first["text"] == "What is 3 + 3? It is 6."
    assert "".join(token["text"] for token in first["tokens"] if token["trained"]) == "It is 6.<|im_end|>"
    (too_long,) = service.datasets.preview(dataset.id, "tiny", RenderRules(128), skip=20)
    assert too_long["line"] == 21
    assert "max_seq_len_tokens is 128" in too_long["problem"]


@pytest.mark.parametrize("look", ["lengths", "preview"])
def test_look_at_what_is_not_there_says_so(service: Service, upload: Callable[..., Path], look: str) -> None:
    dataset = service.datasets.upload(upload(ROWS), filename=None)
    with pytest.raises(NotFound, match="ds_none"):
        getattr(service.datasets, look)("ds_none", "tiny", RenderRules(128))
    with pytest.raises(InvalidModel, match="did you mean 'tiny'"):
        getattr(service.datasets, look)(dataset.id, "tinny", RenderRules(128))


# --- following a job


@pytest.fixture
def running(service: Service, queue: Queue) -> Claim:
    submit(service, dataset={"rows": ROWS})
    return claim_next(queue)


def test_queue_position_counts_the_jobs_before(service: Service, queue: Queue) -> None:
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


def test_events_are_read_on_from_a_number(service: Service, running: Claim) -> None:
    queued, started = service.jobs.events(running.job_id)
    assert service.jobs.events(running.job_id, after=queued.seq) == [started]
    assert service.jobs.events(running.job_id, limit=1) == [queued]
    with pytest.raises(NotFound, match="job_none"):
        service.jobs.events("job_none")


def record(queue: Queue, claim: Claim, step: int, kind: str = "metrics") -> dict[str, Any]:
    data = {"step": step, "attempt": claim.token}
    queue.report(claim, Progress(step=step), (kind, data))
    return data


def test_metrics_of_a_resumed_job_are_those_of_all_attempts(service: Service, queue: Queue, running: Claim) -> None:
    first = [record(queue, running, 0, "evaluation"), *(record(queue, running, step) for step in (1, 2, 3, 4))]
    first.append(record(queue, running, 4, "evaluation"))
    queue.report(running, Progress(), ("log", {"message": "training", "attempt": running.token}))
    assert service.jobs.metrics(running.job_id) == first
    queue.release(running, "the worker was stopped")
    second = claim_next(queue)
    # Until it is known where the second attempt begins, what the first did is the best that is known.
    assert service.jobs.metrics(running.job_id) == first
    resumed = {"message": "resumed after step 2", "attempt": second.token, "resumed_from_step": 2}
    queue.report(second, Progress(), ("log", resumed))
    assert service.jobs.metrics(running.job_id) == first[:3]
    again = record(queue, second, 3)
    assert service.jobs.metrics(running.job_id) == [*first[:3], again]
    with pytest.raises(NotFound):
        service.jobs.metrics("job_none")


def test_of_a_step_done_twice_the_latest_metrics_count(service: Service, queue: Queue, running: Claim) -> None:
    record(queue, running, 0, "evaluation")
    record(queue, running, 1)
    queue.release(running, "the worker was stopped")
    second = claim_next(queue)
    records = [record(queue, second, 0, "evaluation"), record(queue, second, 1), record(queue, second, 1, "evaluation")]
    assert service.jobs.metrics(running.job_id) == records


def test_cancel_ends_a_queued_job_and_asks_a_running_one(service: Service, running: Claim) -> None:
    queued = submit(service, dataset={"rows": ROWS}).job
    assert service.jobs.cancel(queued.id).status is JobStatus.CANCELLED
    assert service.jobs.cancel(running.job_id).stop_request is StopRequest.CANCEL


def test_queued_job_waits_while_it_is_paused(service: Service, queue: Queue) -> None:
    job_id = submit(service, dataset={"rows": ROWS}).job.id
    assert service.jobs.pause(job_id).status is JobStatus.PAUSED
    assert queue.claim("worker") is None
    resumed = service.jobs.resume(job_id)
    assert (resumed.job.status, resumed.queue_position, resumed.warnings) == (JobStatus.QUEUED, 0, ())
    assert claim_next(queue).job_id == job_id


@pytest.mark.parametrize("action", ["cancel", "pause", "resume"])
def test_unknown_job_cannot_be_changed(service: Service, action: str) -> None:
    with pytest.raises(NotFound, match="job_none"):
        getattr(service.jobs, action)("job_none")


def test_only_so_many_jobs_may_wait(
    service: Service, database: Database, queue: Queue, catalog: Catalog, tmp_path: Path, kept: Callable[[], Any]
) -> None:
    artifacts = ArtifactStore((tmp_path / "artifacts").as_uri())
    limited = Service.of(Stores(
        database=database, artifacts=artifacts, catalog=catalog, tmp_dir=tmp_path / "tmp",
        max_queued_jobs=1,
    ))  # fmt: skip
    submit(limited, dataset={"rows": ROWS})
    before = kept()
    with pytest.raises(QuotaExceeded, match=r"1 jobs are in the queue.*cancel one"):
        submit(limited, dataset={"rows": ROWS})
    assert kept() == before
    claim_next(queue)
    submit(limited, dataset={"rows": ROWS})


def test_submission_answered_before_is_not_checked_again(
    service: Service, database: Database, tmp_path: Path, upload: Callable[..., Path]
) -> None:
    def answer(submission: Submission) -> dict[str, Any]:
        return {"id": submission.job.id}

    once = Once("k", "local", "f", answer)
    path = upload(ROWS)
    job = service.jobs.submit(parse_spec(document()), path, once=once).job
    before = stored_rows(database)
    path.unlink()  # reading it again would fail
    with pytest.raises(Replay) as caught:
        service.jobs.submit(parse_spec(document()), path, once=once)
    assert caught.value.answer == {"id": job.id}
    assert stored_rows(database) == before


def test_key_is_stored_with_the_work_or_not_at_all(service: Service, kept: Callable[[], Any]) -> None:
    def fail(_: Job) -> dict[str, Any]:
        raise ZeroDivisionError

    job_id = submit(service, dataset={"rows": ROWS}).job.id
    before = kept()
    with pytest.raises(ZeroDivisionError):
        service.jobs.cancel(job_id, once=Once("k", "local", "f", fail))
    assert kept() == before


# --- artifacts


@pytest.fixture
def published(running: Claim, service: Service, queue: Queue, tmp_path: Path) -> Job:
    """A job that published two files, after a first attempt that published others and was lost."""
    artifacts = ArtifactStore((tmp_path / "artifacts").as_uri())
    artifacts.create(job_key(running.job_id, running.token, "adapter_model.safetensors"), b"of the lost attempt")
    queue.release(running, "the worker was stopped")
    claim = claim_next(queue)
    files = []
    for name, content in {"adapter_model.safetensors": b"weights" * 100, "README.md": b"# card"}.items():
        path = tmp_path / name
        path.write_bytes(content)
        artifacts.put_file(job_key(claim.job_id, claim.token, name), path)
        files.append(describe_file(path))
    manifest = Manifest(
        job_id=claim.job_id, attempt=claim.token, base_model={}, dataset={}, spec={}, plan={}, versions={},
        held_out={}, files=tuple(files),
    )  # fmt: skip
    artifacts.create(job_key(claim.job_id, claim.token, "manifest.json"), manifest.model_dump_json().encode())
    queue.succeed(claim, {"attempt": claim.token})
    return service.jobs.get(claim.job_id)


def content(chunks: Iterator[bytes]) -> bytes:
    return b"".join(chunks)


def test_published_files_are_listed_with_the_manifest_last(service: Service, published: Job) -> None:
    listed = service.artifacts.list_files(published.id)
    assert [artifact.file.name for artifact in listed] == ["adapter_model.safetensors", "README.md", "manifest.json"]
    for artifact in listed:
        assert service.artifacts.get(published.id, artifact.file.name) == artifact
        data = content(service.artifacts.read(artifact))
        assert (len(data), hashlib.sha256(data).hexdigest()) == (artifact.file.bytes, artifact.file.sha256)
    assert service.artifacts.manifest(published.id).attempt == 2


def test_part_of_a_published_file_is_read(service: Service, published: Job) -> None:
    artifact = service.artifacts.get(published.id, "adapter_model.safetensors")
    assert content(service.artifacts.read(artifact, 3, 12)) == (b"weights" * 100)[3:12]


@pytest.mark.parametrize("name", ["nothing", "../1/adapter_model.safetensors", "", "/etc/passwd", "..", "%2e%2e"])
def test_only_what_the_manifest_lists_is_an_artifact(service: Service, published: Job, name: str) -> None:
    with pytest.raises(NotFound, match=r"it published adapter_model\.safetensors, README\.md, manifest\.json"):
        service.artifacts.get(published.id, name)


@pytest.mark.parametrize("state", ["queued", "running", "failed", "cancelled"])
def test_job_that_has_not_succeeded_has_no_artifacts(service: Service, queue: Queue, state: str) -> None:
    job = submit(service, dataset={"rows": ROWS}).job
    if state != "queued":
        claim = claim_next(queue)
    if state == "failed":
        queue.fail(claim, {"code": "job_failed"})
    elif state == "cancelled":
        queue.cancelled(claim)
    for look in (
        service.artifacts.manifest,
        service.artifacts.list_files,
        lambda job_id: service.artifacts.get(job_id, "README.md"),
    ):
        with pytest.raises(Conflict, match=f"job {job.id} is {state}"):
            look(job.id)
        with pytest.raises(NotFound):
            look("job_none")


# --- the service itself


def test_ready_service_says_nothing_and_leaves_no_file(service: Service, kept: Callable[[], Any]) -> None:
    before = kept()
    service.check_ready()
    assert kept() == before


def test_service_without_its_disk_or_tables_is_not_ready(service: Service, database: Database, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "tmp")
    with pytest.raises(Unavailable, match="disk"):
        service.check_ready()
    with database.write() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs RENAME TO gone")
    with pytest.raises(Unavailable, match="database"):
        service.check_ready()


def test_service_opens_on_an_empty_directory_and_again_on_what_is_there(tmp_path: Path, catalog: Catalog) -> None:
    def opened() -> Service:
        return open_service(
            database_url=f"sqlite:///{tmp_path / 'data/state.db'}",
            artifact_url=(tmp_path / "data/artifacts").as_uri(),
            models_dir=catalog.models_dir,
            tmp_dir=tmp_path / "data/tmp",
        )

    first = opened()
    job = submit(first, dataset={"rows": ROWS}).job
    first.close()
    second = opened()
    assert second.jobs.list_jobs() == [job]
    assert [model.name for model in second.models.list()] == ["tiny"]
    assert second.models.get("tiny") == second.models.list()[0]
    second.close()


def test_a_length_nobody_asked_for_fits_the_model(service: Service) -> None:
    spec = parse_spec({"base_model": "tiny", "dataset": {"rows": ROWS}, "training": {"batch_size": 4}})
    job = service.jobs.submit(spec).job
    assert job.spec.training.max_seq_len_tokens == MAX_POSITIONS
    assert job.spec.training.batch_size == 4


# --- judging with a dataset of its own


def test_job_is_judged_with_the_dataset_it_names(service: Service, upload: Callable[..., Path]) -> None:
    judged = service.datasets.upload(upload(ROWS[:3], "judged.jsonl"), filename=None)
    job = submit(service, dataset={"rows": ROWS[3:]}, validation={"dataset_id": judged.id}).job
    assert job.spec.validation.dataset_id == judged.id
    assert not job.spec.validation.held_out_fraction
    assert service.jobs.get(job.id) == job


@pytest.mark.parametrize(
    ("rows", "fault", "reason"),
    [
        (None, NotFound, "no dataset"),
        (ROWS[:6], InvalidSpec, "validation rows are the training rows"),
        ([*ROWS[:3], LONG], InvalidDataset, "1 of 4 rows of the dataset are longer"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], InvalidSpec, "pairs of a chosen"),
    ],
)
def test_dataset_that_cannot_judge_is_refused(
    service: Service, upload: Callable[..., Path], rows: list[Any] | None, fault: type[QLoRAError], reason: str
) -> None:
    judged = "ds_none" if rows is None else service.datasets.upload(upload(rows, "judged.jsonl"), filename=None).id
    trained = service.datasets.upload(upload(ROWS[:6], "trained.jsonl"), filename=None).id
    with pytest.raises(fault, match=reason) as caught:
        submit(service, dataset={"id": trained}, validation={"dataset_id": judged})
    assert caught.value.location == "/validation/dataset_id"
    assert service.jobs.list_jobs() == []


def test_another_projects_dataset_cannot_judge(service: Service, upload: Callable[..., Path]) -> None:
    judged = service.within("other").datasets.upload(upload(ROWS[:3], "judged.jsonl"), filename=None)
    with pytest.raises(NotFound):
        submit(service, dataset={"rows": ROWS[3:]}, validation={"dataset_id": judged.id})


# --- fine-tuned models


def test_withdrawn_model_is_gone_and_says_when(service: Service, published: Job, tmp_path: Path) -> None:
    name = tuned_model_name(published)
    assert name is not None
    assert service.tuned_models.list_models(limit=9) == [service.tuned_models.get(name)] == [published]
    with pytest.raises(NotFound):
        service.within("other").tuned_models.delete(name)
    withdrawn = service.tuned_models.delete(name)
    assert withdrawn.withdrawn_at is not None
    assert not list((tmp_path / "artifacts" / "jobs").rglob("*.*"))
    for look in (service.tuned_models.get, service.tuned_models.delete):
        with pytest.raises(NotFound, match="no model"):
            look(name)
    with pytest.raises(Conflict, match=f"was deleted at {withdrawn.withdrawn_at:%Y-%m-%d}"):
        service.artifacts.list_files(published.id)


def test_name_that_is_not_quite_the_models_finds_nothing(service: Service, published: Job) -> None:
    name = tuned_model_name(published)
    assert name is not None
    for wrong in (name.replace("ft:tiny", "ft:tony"), f"{name} ", name[3:], "tiny", published.id):
        with pytest.raises(NotFound):
            service.tuned_models.delete(wrong)
    assert service.artifacts.list_files(published.id)
