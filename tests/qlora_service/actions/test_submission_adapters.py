"""Jobs whose adapter the base supports only in part, or not at all: known when they are posted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_service.actions.service import Service
from qlora_service.errors import InvalidSpec
from qlora_service.models.catalog.catalog import Catalog
from qlora_service.planning import planner
from qlora_service.planning.planner import UNKNOWN, Planner
from qlora_service.specs import parse_spec
from tests.qlora_service.actions._submissions import ROWS, job_request, submit
from tests.tiny_families import build_family

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def long_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine must not make the check of an adapter give up."""
    monkeypatch.setattr(planner, "ATTACHMENT_TIMEOUT_S", 240.0)


@pytest.fixture(scope="module", autouse=True)
def families(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases of the catalog that are named after their model type."""
    directory = tmp_path_factory.mktemp("families")
    for family in ("falcon_h1", "gpt_oss", "phimoe"):
        catalog.import_model(family, build_family(directory / family, family))
    return directory


@pytest.fixture(scope="module")
def checked_adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.fixture
def service(make_service: Callable[..., Service], checked_adapters: Path) -> Service:
    return make_service(planner=Planner(UNKNOWN, checked_adapters))


def test_job_that_leaves_experts_out_is_queued_with_one_warning(service: Service) -> None:
    (warning,) = submit(service, base_model="gpt_oss", dataset={"rows": ROWS}).job.warnings
    assert "% of the base's weights (the routed experts: model.layers.*.mlp.experts.gate_up_proj, " in warning
    assert "get no adapter" in warning


def test_job_on_a_hybrid_names_the_modules_that_are_left_out(service: Service) -> None:
    (warning,) = submit(service, base_model="falcon_h1", dataset={"rows": ROWS}).job.warnings
    assert "(model.layers.*.mamba.out_proj.weight) get no adapter" in warning


@pytest.mark.parametrize(
    ("family", "targets", "works"),
    [("falcon_h1", ["q_proj", "out_proj"], "in_proj, k_proj"), ("phimoe", ["w1", "w3"], "k_proj, o_proj")],
)
def test_module_that_cannot_be_adapted_is_refused_with_modules_that_can(
    service: Service, family: str, targets: list[str], works: str
) -> None:
    adapter = {"target_modules": targets}
    with pytest.raises(InvalidSpec, match=f"it can adapt .*{works}") as refused:
        submit(service, base_model=family, dataset={"rows": ROWS}, adapter=adapter)
    assert refused.value.location == "/adapter/target_modules"
    assert service.jobs.list_jobs() == []


def test_named_modules_that_can_be_adapted_give_no_warning(service: Service) -> None:
    adapter = {"target_modules": ["q_proj", "in_proj"]}
    assert submit(service, base_model="falcon_h1", dataset={"rows": ROWS}, adapter=adapter).job.warnings == []


def test_plan_counts_what_is_adapted_and_says_what_is_not(service: Service) -> None:
    request: dict[str, Any] = job_request(base_model="gpt_oss", adapter={"r": 4})
    plan = service.plans.plan(parse_spec(request), device="24GB")
    # Queries, keys, values and output of two layers, and no expert.
    expected = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32))
    assert (plan.memory.trained_parameters, plan.storage.adapter_bytes) == (expected, 4 * expected)
    assert "get no adapter" in plan.notes[0]
