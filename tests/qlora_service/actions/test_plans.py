"""Plans of models in the catalog and of rows that are stored; and what a plan does to a job that is posted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_service.actions.service import Service, Stores
from qlora_service.artifacts.store import ArtifactStore
from qlora_service.data.rendering.renderer import RenderRules
from qlora_service.errors import InvalidDataset, InvalidModel, InvalidSpec, NotFound
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.planning.memory import GIB
from qlora_service.planning.planner import UNKNOWN, Planner
from qlora_service.specs import JobSpec, parse_spec
from tests.control_plane import sqlite_database
from tests.planning_models import MODELS
from tests.running_api import ROWS, write_rows

Open = Callable[[str], Service]
FITS_NOTHING = "1GB"
"""CUDA's context takes all of it"""


@pytest.fixture(scope="module")
def simulations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was simulated for one of these tests is there for the others: it takes seconds."""
    return tmp_path_factory.mktemp("plans")


@pytest.fixture
def on(tmp_path: Path, tiny_model: Path, simulations: Path) -> Iterator[Open]:
    """The service, its jobs being planned for that device."""
    database = sqlite_database(tmp_path)
    catalog = Catalog(tmp_path / "models")
    catalog.import_model("tiny", tiny_model)

    def open_for(device: str) -> Service:
        return Service.of(
            Stores(
                database=database,
                artifacts=ArtifactStore((tmp_path / "artifacts").as_uri()),
                catalog=catalog,
                planner=Planner(device, simulations),
                tmp_dir=tmp_path / "tmp",
            )
        )

    yield open_for
    database.close()


def spec(**groups: Any) -> JobSpec:
    return parse_spec(
        {"base_model": "tiny", "dataset": {"rows": ROWS}, "training": {"max_seq_len_tokens": 128}} | groups
    )


def test_the_stored_rows_say_how_long_the_longest_is(on: Open, tmp_path: Path) -> None:
    service = on("24GB")
    dataset = service.datasets.upload(write_rows(tmp_path / "rows.jsonl"), filename="rows.jsonl")
    longest = service.datasets.lengths(dataset.id, "tiny", RenderRules(128)).longest_tokens
    known, unknown = service.plans.plan(spec(dataset={"id": dataset.id})), service.plans.plan(spec(dataset={}))
    assert (known.longest_tokens, unknown.longest_tokens) == (longest, 128)
    assert known.memory.allocated < unknown.memory.allocated
    assert known.storage.checkpoint_bytes > unknown.storage.checkpoint_bytes  # its rows and steps are known


def test_a_length_that_nobody_asked_for_is_what_a_job_would_have(on: Open) -> None:
    plan = on("24GB").plans.plan(spec(dataset={}, training={}))
    assert plan.longest_tokens == 512  # all that the tiny model handles


def test_a_plan_for_another_card_than_the_jobs_run_on(on: Open) -> None:
    service = on(FITS_NOTHING)
    named = service.plans.plan(spec(dataset={}), device="RTX 3090")
    assert (named.verdict, named.device.name, named.found_by) == ("fits", "RTX 3090", "name")
    own = service.plans.plan(spec(dataset={}))
    assert (own.verdict, own.found_by) == ("does_not_fit", "setting")
    part = service.plans.plan(spec(dataset={}), device="RTX 3090", free_bytes=GIB)
    assert (part.verdict, part.usable_bytes) == ("does_not_fit", 0)


def test_a_config_is_enough(on: Open) -> None:
    plan = on("24GB").plans.plan(JobSpec(base_model="config.json"), config=MODELS["Llama-2-70B"])
    assert plan.verdict == "does_not_fit"
    assert plan.memory.trained_parameters > 10**8


@pytest.mark.parametrize(
    ("asked", "error", "place"),
    [
        (spec(base_model="absent", dataset={}), InvalidModel, None),
        (spec(dataset={"id": "ds_none"}), NotFound, "/dataset/id"),
        (spec(), InvalidSpec, "/dataset/rows"),
        (spec(dataset={}, training={"max_seq_len_tokens": 4096}), InvalidSpec, "/training/max_seq_len_tokens"),
        (spec(dataset={}, adapter={"target_modules": ["nope"]}), InvalidSpec, "/adapter/target_modules"),
    ],
)
def test_what_a_job_is_refused_for_its_plan_is_too(on: Open, asked: JobSpec, error: type, place: str | None) -> None:
    with pytest.raises(error) as caught:
        on("24GB").plans.plan(asked)
    assert caught.value.location == place


def test_rows_that_are_too_long_are_refused_before_they_are_planned(on: Open, tmp_path: Path) -> None:
    service = on("24GB")
    dataset = service.datasets.upload(write_rows(tmp_path / "rows.jsonl"), filename="rows.jsonl")
    with pytest.raises(InvalidDataset, match="longer than max_seq_len_tokens = 8"):
        service.plans.plan(spec(dataset={"id": dataset.id}, training={"max_seq_len_tokens": 8}))


def test_rows_of_a_config_have_no_length(on: Open) -> None:
    asked = JobSpec.model_validate({"base_model": "config.json", "dataset": {"id": "ds_1"}})
    with pytest.raises(InvalidSpec, match="tokenizer"):
        on("24GB").plans.plan(asked, config=MODELS["Llama-2-7B"])


def test_what_was_predicted_is_kept_with_the_job(on: Open) -> None:
    service = on("RTX 3090")
    submission = service.jobs.submit(spec())
    forecast = service.jobs.get(submission.job.id).forecast
    assert forecast is not None
    assert (forecast["verdict"], forecast["device"]["name"]) == ("fits", "RTX 3090")
    assert forecast["settings"]["gradient_checkpointing"] is False
    assert forecast["memory"]["needed"] <= forecast["memory"]["usable"]
    assert submission.warnings == ()


def test_a_job_that_does_not_fit_is_refused_and_nothing_is_stored(on: Open) -> None:
    service = on(FITS_NOTHING)
    reason = r"needs at least .*, a card of 1 GB has 0 MiB available.*force: true"
    with pytest.raises(InvalidSpec, match=reason) as caught:
        service.jobs.submit(spec())
    assert caught.value.location == "/base_model"
    details = caught.value.details
    assert (details["verdict"], details["device"]["name"], details["alternatives"]) == (
        "does_not_fit",
        "a card of 1 GB",
        [],
    )
    assert details["largest"] == {"max_seq_len_tokens": None, "batch_size": None, "model": None}
    assert details["memory"]["free"] < 0
    assert service.jobs.list_jobs() == service.datasets.list_datasets() == []


def test_force_queues_it_with_a_warning(on: Open) -> None:
    submission = on(FITS_NOTHING).jobs.submit(spec(), force=True)
    (warning,) = submission.warnings
    assert warning.startswith("it is not expected to fit: the job needs")
    assert submission.job.forecast is not None
    assert submission.job.forecast["verdict"] == "does_not_fit"


def test_where_the_device_is_unknown_nobody_is_refused(on: Open) -> None:
    assert on(UNKNOWN).jobs.submit(spec()).job.forecast is None
