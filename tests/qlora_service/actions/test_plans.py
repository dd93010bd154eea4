"""Plans of jobs on catalog models and stored rows, and the plan of a submitted job."""

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

MakeService = Callable[[str], Service]
TOO_SMALL = "1GB"
"""A card whose memory is used up by CUDA's context"""


@pytest.fixture(scope="module")
def simulations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache of simulations for all tests of this file: each takes seconds."""
    return tmp_path_factory.mktemp("plans")


@pytest.fixture
def service_on(tmp_path: Path, tiny_model: Path, simulations: Path) -> Iterator[MakeService]:
    """Makes a service that plans jobs for the given device."""
    database = sqlite_database(tmp_path)
    catalog = Catalog(tmp_path / "models")
    catalog.import_model("tiny", tiny_model)

    def make(device: str) -> Service:
        return Service.of(
            Stores(
                database=database,
                artifacts=ArtifactStore((tmp_path / "artifacts").as_uri()),
                catalog=catalog,
                planner=Planner(device, simulations),
                tmp_dir=tmp_path / "tmp",
            )
        )

    yield make
    database.close()


def spec(**groups: Any) -> JobSpec:
    return parse_spec(
        {"base_model": "tiny", "dataset": {"rows": ROWS}, "training": {"max_seq_len_tokens": 128}} | groups
    )


def test_plan_uses_the_longest_of_the_stored_rows(service_on: MakeService, tmp_path: Path) -> None:
    service = service_on("24GB")
    dataset = service.datasets.upload(write_rows(tmp_path / "rows.jsonl"), filename="rows.jsonl")
    longest = service.datasets.lengths(dataset.id, "tiny", RenderRules(128)).longest_tokens
    known, unknown = service.plans.plan(spec(dataset={"id": dataset.id})), service.plans.plan(spec(dataset={}))
    assert (known.longest_tokens, unknown.longest_tokens) == (longest, 128)
    assert known.memory.allocated < unknown.memory.allocated
    assert known.storage.checkpoint_bytes > unknown.storage.checkpoint_bytes  # the number of rows and steps is known


def test_default_length_of_a_plan_is_that_of_a_job(service_on: MakeService) -> None:
    plan = service_on("24GB").plans.plan(spec(dataset={}, training={}))
    assert plan.longest_tokens == 512  # the tiny model's maximum


@pytest.mark.slow
def test_plan_for_another_card_than_that_of_the_workers(service_on: MakeService) -> None:
    service = service_on(TOO_SMALL)
    named = service.plans.plan(spec(dataset={}), device="RTX 3090")
    assert (named.verdict, named.device.name, named.found_by) == ("fits", "RTX 3090", "name")
    own = service.plans.plan(spec(dataset={}))
    assert (own.verdict, own.found_by) == ("does_not_fit", "setting")
    occupied = service.plans.plan(spec(dataset={}), device="RTX 3090", free_bytes=GIB)
    assert (occupied.verdict, occupied.usable_bytes) == ("does_not_fit", 0)


def test_a_config_without_a_model_can_be_planned(service_on: MakeService) -> None:
    plan = service_on("24GB").plans.plan(JobSpec(base_model="config.json"), config=MODELS["Llama-2-70B"])
    assert plan.verdict == "does_not_fit"
    assert plan.memory.trained_parameters > 10**8


@pytest.mark.parametrize(
    ("job", "error", "location"),
    [
        (spec(base_model="absent", dataset={}), InvalidModel, None),
        (spec(dataset={"id": "ds_none"}), NotFound, "/dataset/id"),
        (spec(), InvalidSpec, "/dataset/rows"),
        (spec(dataset={}, training={"max_seq_len_tokens": 4096}), InvalidSpec, "/training/max_seq_len_tokens"),
        (spec(dataset={}, adapter={"target_modules": ["nope"]}), InvalidSpec, "/adapter/target_modules"),
    ],
)
def test_plan_is_refused_for_the_same_errors_as_a_job(
    service_on: MakeService, job: JobSpec, error: type, location: str | None
) -> None:
    with pytest.raises(error) as caught:
        service_on("24GB").plans.plan(job)
    assert caught.value.location == location


def test_plan_with_rows_that_are_too_long_is_refused(service_on: MakeService, tmp_path: Path) -> None:
    service = service_on("24GB")
    dataset = service.datasets.upload(write_rows(tmp_path / "rows.jsonl"), filename="rows.jsonl")
    with pytest.raises(InvalidDataset, match="longer than max_seq_len_tokens = 8"):
        service.plans.plan(spec(dataset={"id": dataset.id}, training={"max_seq_len_tokens": 8}))


def test_rows_cannot_be_measured_with_a_config_only(service_on: MakeService) -> None:
    job = JobSpec.model_validate({"base_model": "config.json", "dataset": {"id": "ds_1"}})
    with pytest.raises(InvalidSpec, match="tokenizer"):
        service_on("24GB").plans.plan(job, config=MODELS["Llama-2-7B"])


def test_forecast_is_stored_with_the_job(service_on: MakeService) -> None:
    service = service_on("RTX 3090")
    submission = service.jobs.submit(spec())
    forecast = service.jobs.get(submission.job.id).forecast
    assert forecast is not None
    assert (forecast["verdict"], forecast["device"]["name"]) == ("fits", "RTX 3090")
    assert forecast["settings"]["gradient_checkpointing"] is False
    assert forecast["memory"]["needed"] <= forecast["memory"]["usable"]
    assert submission.job.warnings == []


@pytest.mark.slow
def test_a_job_that_does_not_fit_is_refused_and_nothing_is_stored(service_on: MakeService) -> None:
    service = service_on(TOO_SMALL)
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


@pytest.mark.slow
def test_job_that_does_not_fit_is_queued_with_force_and_a_warning(service_on: MakeService) -> None:
    submission = service_on(TOO_SMALL).jobs.submit(spec(), force=True)
    (warning,) = submission.job.warnings
    assert warning.startswith("it is not expected to fit: the job needs")
    assert submission.job.forecast is not None
    assert submission.job.forecast["verdict"] == "does_not_fit"


def test_no_job_is_refused_on_an_unknown_device(service_on: MakeService) -> None:
    assert service_on(UNKNOWN).jobs.submit(spec()).job.forecast is None
