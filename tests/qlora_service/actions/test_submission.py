import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qlora_service.actions.service import Service
from qlora_service.artifacts.manifest import describe_file
from qlora_service.artifacts.store import dataset_key
from qlora_service.domain.jobs import JobStatus
from qlora_service.errors import InvalidDataset, InvalidModel, InvalidSpec, NotFound, QLoRAError
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.specs import parse_spec
from qlora_service.store.database import Database
from tests.control_plane import SteppedClock, job_events, stored_rows
from tests.qlora_service.actions._submissions import LONG, PNG, ROWS, jsonl, submit
from tests.tiny_model import MAX_POSITIONS, build_tiny_model

MEDIUM = {"prompt": "once ", "completion": "a " * 200}
PAIRS = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No idea."} for n in range(20)]
LABELLED = [{"prompt": f"What is {n}?", "completion": f"It is {n}.", "label": n % 2 == 0} for n in range(20)]


# --- submissions


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


@pytest.mark.parametrize("has_template", [True, False])
def test_spec_of_a_queued_job_says_how_text_prompts_are_rendered(
    service: Service, catalog: Catalog, tmp_path: Path, has_template: bool
) -> None:
    if not has_template and "bare" not in {model.name for model in catalog.list()}:
        catalog.import_model("bare", build_tiny_model(tmp_path / "bare", chat_template=None))
    taken, other = ("chat", "plain") if has_template else ("plain", "chat")
    for asked, expected in (("auto", taken), (taken, taken), (other, other)):
        training = {"max_seq_len_tokens": 128, "prompt_format": asked}
        spec = {"base_model": "tiny" if has_template else "bare", "dataset": {"rows": ROWS}, "training": training}
        job = service.jobs.submit(parse_spec(spec)).job
        assert job.spec.training.prompt_format == expected
        assert service.jobs.get(job.id).spec == job.spec


@pytest.mark.parametrize(
    ("rows", "objective", "expected"),
    [
        (PAIRS, "supervised", '"dpo"'),
        (LABELLED, "supervised", '"kto"'),
        (ROWS, "dpo", "preference"),
        (PAIRS, "kto", '"dpo"'),
        (LABELLED, "orpo", '"kto"'),
    ],
)
def test_objective_that_does_not_match_the_rows_is_refused_and_nothing_is_stored(
    service: Service, stored_state: Callable[[], Any], rows: list[dict[str, Any]], objective: str, expected: str
) -> None:
    before = stored_state()
    with pytest.raises(InvalidSpec, match=expected) as caught:
        submit(service, dataset={"rows": rows}, objective={"type": objective})
    assert caught.value.location == "/objective/type"
    assert stored_state() == before


@pytest.mark.parametrize(("rows", "objective"), [(PAIRS, "dpo"), (PAIRS, "orpo"), (LABELLED, "kto")])
def test_preference_rows_are_accepted_with_their_objectives(
    service: Service, rows: list[dict[str, Any]], objective: str
) -> None:
    job = submit(service, dataset={"rows": rows}, objective={"type": objective}).job
    assert (job.status, job.spec.objective.type) == (JobStatus.QUEUED, objective)


def test_rows_in_any_language_are_stored_unchanged(service: Service, tmp_path: Path) -> None:
    rows = [{"prompt": "你好 🌊 ", "completion": "ça va\u2028?\\n"}, {"prompt": "ñ", "completion": "\U0001f600"}]
    dataset = service.datasets.get(submit(service, dataset={"rows": rows}).job.dataset_id)
    stored = (tmp_path / "artifacts" / dataset_key(dataset.sha256)).read_bytes()
    assert [json.loads(line) for line in stored.split(b"\n") if line] == rows
    assert dataset.report.usable_rows == 2


def test_upload_is_stored_unchanged(
    service: Service, upload: Callable[..., Path], tmp_path: Path, stored_state: Callable[[], Any]
) -> None:
    path = upload(ROWS)
    job = submit(service, path).job
    dataset = service.datasets.get(job.dataset_id)
    assert (dataset.filename, dataset.sha256) == ("rows.jsonl", describe_file(path).sha256)
    assert (tmp_path / "artifacts" / dataset_key(dataset.sha256)).read_bytes() == path.read_bytes()
    assert not any("tmp/" in str(file.relative_to(tmp_path)) for file in stored_state()[1])


def test_upload_is_read_in_the_format_of_the_spec(service: Service, upload: Callable[..., Path]) -> None:
    file_format = {"container": "text", "shape": "text"}
    job = submit(service, upload(ROWS[:1], "a.jsonl"), dataset=file_format, validation={"fraction": 0}).job
    report = service.datasets.get(job.dataset_id).report
    assert (report.container, report.shape) == ("text", "text")
    # The format is stored with the dataset, not with the spec.
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
    # Not written again.
    assert stored.stat().st_mtime_ns == written_ns
    assert len(stored_rows(database)["datasets"]) == 1


def test_same_content_is_the_same_dataset(service: Service, upload: Callable[..., Path], database: Database) -> None:
    first = service.datasets.upload(upload(ROWS, "a.jsonl"), filename="a.jsonl")
    assert service.datasets.upload(upload(ROWS, "b.jsonl"), filename="b.jsonl") == first
    assert submit(service, upload(ROWS, "c.jsonl")).job.dataset_id == first.id
    inline = {submit(service, dataset={"rows": ROWS[:5]}).job.dataset_id for _ in range(2)}
    assert len(inline) == 1
    assert service.datasets.list_datasets() == [service.datasets.get(inline.pop()), first]


def test_upload_repairs_an_object_truncated_by_a_power_cut(
    service: Service, upload: Callable[..., Path], tmp_path: Path
) -> None:
    path = upload(ROWS)
    dataset = service.datasets.upload(path, filename=None)
    stored = tmp_path / "artifacts" / dataset_key(dataset.sha256)
    stored.write_bytes(b"")
    service.datasets.upload(path, filename=None)
    assert stored.read_bytes() == path.read_bytes()


def test_default_length_is_that_of_the_model(service: Service) -> None:
    spec = parse_spec({"base_model": "tiny", "dataset": {"rows": ROWS}, "training": {"batch_size": 4}})
    job = service.jobs.submit(spec).job
    assert job.spec.training.max_seq_len_tokens == MAX_POSITIONS
    assert job.spec.training.batch_size == 4


# --- refusals


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
    "path as base model": BadInput(
        InvalidModel, "there is no base model", None, {"base_model": "../models/tiny", "dataset": {"rows": ROWS}}
    ),
    "length beyond the model": BadInput(
        InvalidSpec, f"set it to {MAX_POSITIONS} or less", "/training/max_seq_len_tokens",
        {"dataset": {"rows": ROWS}, "training": {"max_seq_len_tokens": MAX_POSITIONS + 1}},
    ),
    "module that the model lacks": BadInput(
        InvalidSpec, "tiny has no c_attn; its modules are down_proj,", "/adapter/target_modules",
        {"dataset": {"rows": ROWS}, "adapter": {"target_modules": ["q_proj", "c_attn"]}},
    ),
    "no rows": BadInput(InvalidDataset, "it has no rows", None, {"dataset": {"rows": []}}),
    "no usable row": BadInput(
        InvalidDataset, "cannot be used", None, {"dataset": {"rows": [{"question": "a"}, {"b": 1}]}}, line=1
    ),
    "no row of the given shape": BadInput(
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
    "every row dropped as too long": BadInput(
        InvalidDataset, "tokens: set training.too_long to truncate", "/dataset",
        {"dataset": {"rows": [LONG, LONG]}, "training": {"too_long": "drop"}}, line=1,
    ),
    "one row too long": BadInput(
        InvalidDataset, "tokens: raise it to 218 to keep them whole, or set training.too_long to truncate or drop",
        "/dataset", {"dataset": {"rows": [*ROWS, MEDIUM]}}, line=21,
    ),
    "nothing to train after truncation": BadInput(
        InvalidDataset, "no row of the dataset can be trained on: line 1: nothing to train", "/dataset",
        {
            "dataset": {"rows": [{"prompt": "once upon " * 200, "completion": "a time"}] * 2},
            "training": {"too_long": "truncate"},
        },
        line=1,
    ),
    "one row and a held-out fraction": BadInput(
        InvalidDataset, "set validation.fraction to 0", "/dataset", {"dataset": {"rows": ROWS[:1]}}
    ),
    "empty file": BadInput(InvalidDataset, "is empty", None, {}, b""),
    "image named as JSON Lines": BadInput(InvalidDataset, "seems to be a PNG image", None, {}, PNG),
    "CSV named as Parquet": BadInput(
        InvalidDataset, "as its name says", None, {}, b"prompt,completion\na,b\n", "rows.parquet"
    ),
    "JSON Lines named as CSV": BadInput(InvalidDataset, "as its name says", None, {}, jsonl(ROWS), "rows.csv"),
    "damaged Parquet": BadInput(
        InvalidDataset, "arquet", None, {}, b"PAR1" + bytes(100) + b"PAR1", "rows.parquet"
    ),
    "lines of invalid JSON": BadInput(
        InvalidDataset, "none of its rows can be read", None, {}, b'{"text": \n{"text"\n', line=1
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_and_nothing_is_stored(
    service: Service, upload: Callable[..., Path], stored_state: Callable[[], Any], case: str
) -> None:
    bad = BAD_INPUT[case]
    path = None if bad.upload is None else upload(bad.upload, bad.filename)
    before = stored_state()
    with pytest.raises(bad.kind) as caught:
        submit(service, path, **bad.groups)
    assert type(caught.value) is bad.kind
    assert bad.message in caught.value.message
    assert caught.value.location == bad.location
    if bad.line is not None:
        assert caught.value.findings[0].line == bad.line
    assert stored_state() == before
    assert not any(before[0].values())


def test_refused_job_keeps_its_stored_dataset(
    service: Service, upload: Callable[..., Path], database: Database
) -> None:
    dataset = service.datasets.upload(upload([*ROWS, LONG]), filename=None)
    with pytest.raises(InvalidDataset, match="1 of 21 rows"):
        submit(service, dataset={"id": dataset.id})
    rows = stored_rows(database)
    assert (len(rows["datasets"]), rows["jobs"], rows["events"]) == (1, [], [])


def test_one_row_is_enough_when_none_is_held_out(service: Service) -> None:
    assert submit(service, dataset={"rows": ROWS[:1]}, validation={"fraction": 0}).job.status is JobStatus.QUEUED


def test_unusable_upload_of_a_dataset_leaves_nothing(
    service: Service, upload: Callable[..., Path], stored_state: Callable[[], Any]
) -> None:
    before = stored_state()
    with pytest.raises(InvalidDataset, match="PNG"):
        service.datasets.upload(upload(PNG, "a.csv"), filename="a.csv")
    assert stored_state() == before


# --- validation datasets


def test_job_with_a_validation_dataset_is_queued(service: Service, upload: Callable[..., Path]) -> None:
    validation = service.datasets.upload(upload(ROWS[:3], "validation.jsonl"), filename=None)
    job = submit(service, dataset={"rows": ROWS[3:]}, validation={"dataset_id": validation.id}).job
    assert job.spec.validation.dataset_id == validation.id
    assert not job.spec.validation.held_out_fraction
    assert service.jobs.get(job.id) == job


@pytest.mark.parametrize(
    ("rows", "error", "reason"),
    [
        (None, NotFound, "no dataset"),
        (ROWS[:6], InvalidSpec, "validation rows are the training rows"),
        ([*ROWS[:3], LONG], InvalidDataset, "1 of 4 rows of the dataset are longer"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], InvalidSpec, "pairs of a chosen"),
    ],
)
def test_unsuitable_validation_dataset_is_refused(
    service: Service, upload: Callable[..., Path], rows: list[Any] | None, error: type[QLoRAError], reason: str
) -> None:
    validation_id = "ds_none"
    if rows is not None:
        validation_id = service.datasets.upload(upload(rows, "validation.jsonl"), filename=None).id
    training_id = service.datasets.upload(upload(ROWS[:6], "training.jsonl"), filename=None).id
    with pytest.raises(error, match=reason) as caught:
        submit(service, dataset={"id": training_id}, validation={"dataset_id": validation_id})
    assert caught.value.location == "/validation/dataset_id"
    assert service.jobs.list_jobs() == []


def test_validation_dataset_of_another_project_is_not_found(service: Service, upload: Callable[..., Path]) -> None:
    validation = service.within("other").datasets.upload(upload(ROWS[:3], "validation.jsonl"), filename=None)
    with pytest.raises(NotFound):
        submit(service, dataset={"rows": ROWS[3:]}, validation={"dataset_id": validation.id})
