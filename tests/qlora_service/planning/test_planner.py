"""Plans from a config.json: the device, the simulations, and the text of the plan. Two child processes in all."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_service.errors import InvalidModel, InvalidRequest, InvalidSpec
from qlora_service.planning import planner
from qlora_service.planning.cards import Device
from qlora_service.planning.hardware import Gpu, this_cpu
from qlora_service.planning.memory import GIB
from qlora_service.planning.planner import UNKNOWN, FoundDevice, Planner, shape_of
from qlora_service.specs import JobSpec
from tests.planning_models import MODELS, TIED, config
from tests.tiny_families import family_config

CONFIG = MODELS["Llama-2-7B"]
SMALL = config(64, 128, 2, 4, 2, 256, **TIED)
SPEC = JobSpec.model_validate({"base_model": "m", "training": {"max_seq_len_tokens": 64, "batch_size": 2}})


@pytest.fixture(autouse=True)
def long_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine must not make these tests fall back to the formula."""
    monkeypatch.setattr(planner, "SIMULATION_TIMEOUT_S", 240.0)


def tight_device() -> FoundDevice:
    """A card within the formula's error for SMALL: exactly the memory of the setting that needs least."""
    card = Device("card", 24 * GIB)
    spec = SPEC.model_copy(update={"training": SPEC.training.model_copy(update={"gradient_checkpointing": True})})
    reserved = Planner().plan(SMALL, spec, FoundDevice(card, "name"), simulates=False).memory.reserved
    return FoundDevice(replace(card, free_bytes=reserved + GIB), "name")


def test_plan_by_the_formula_names_its_source() -> None:
    plan = Planner().plan(CONFIG, SPEC, Planner().device("RTX 3090"))
    assert (plan.verdict, plan.source, plan.is_sure, list(plan.notes)) == ("fits", "formula", True, [])
    assert plan.reason.startswith("the job needs ")
    assert "RTX 3090 has 22.5 GiB available" in plan.reason


def test_figures_of_a_plan_add_up() -> None:
    plan = Planner().plan(CONFIG, SPEC, Planner().device("24GB")).as_dict()
    memory = plan["memory"]
    assert sum(memory["categories"].values()) == memory["allocated"] <= memory["reserved"]
    assert memory["needed"] == memory["reserved"] + memory["optimizer_host"]
    assert memory["free"] == memory["usable"] - memory["needed"]
    assert plan["trained_parameters"] * 4 == plan["storage"]["adapter_bytes"]
    assert memory["needed"] < plan["bf16_lora_bytes"] < plan["full_fine_tuning_bytes"]
    assert plan["full_fine_tuning_bytes"] > 16 * 6.7e9
    assert json.loads(json.dumps(plan)) == plan


def test_reason_of_does_not_fit_names_the_largest_category_and_a_model_that_fits() -> None:
    plan = Planner().plan(MODELS["LLaMA-65B"], SPEC, Planner().device("24GB"))
    assert plan.verdict == "does_not_fit"
    assert "packed weights alone take 30.2 GiB" in plan.reason
    assert plan.largest is not None
    assert f"{plan.largest.model} at most" in plan.reason
    assert "batch_size" in plan.reason


def test_reason_of_fits_if_names_the_changes() -> None:
    spec = JobSpec.model_validate(
        {"base_model": "m", "training": {"max_seq_len_tokens": 4096, "gradient_checkpointing": False}}
    )
    plan = Planner().plan(CONFIG, spec, Planner().device("12GB"))
    assert plan.verdict == "fits_if"
    assert "set training.gradient_checkpointing to auto; or training.max_seq_len_tokens to " in plan.reason


@pytest.mark.slow
def test_simulation_is_stored_for_the_next_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tight_device()
    first = Planner(cache_dir=tmp_path).plan(SMALL, SPEC, found)
    assert first.source == "simulation"
    assert first.is_sure
    monkeypatch.setattr(planner, "SIMULATION_TIMEOUT_S", 0.001)  # too short for any child
    again = Planner(cache_dir=tmp_path).plan(SMALL, SPEC, found)
    assert again.as_dict() == first.as_dict()


@pytest.mark.slow
def test_notes_say_why_nothing_was_simulated_and_advise_a_probe() -> None:
    unheard_of = {**CONFIG, "model_type": "unheard_of"}
    plan = Planner().plan(unheard_of, SPEC, Planner().device("24GB"))
    assert (plan.verdict, plan.source, plan.is_sure) == ("fits", "formula", False)
    assert "unheard_of" in plan.notes[0]
    assert "does not know the architecture" in plan.notes[0]
    assert any("probe" in note for note in plan.notes)


def test_plans_do_not_simulate_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "LOCK_TIMEOUT_S", 0.01)
    busy = Planner()
    lock: threading.Lock = busy._simulation_lock
    with lock:
        plan = busy.plan(SMALL, SPEC, tight_device())
    assert (plan.source, plan.is_sure) == ("formula", False)
    assert "other plans are being simulated" in plan.notes[0]


def test_without_torch_nothing_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "has_torch", lambda: False)
    plan = Planner().plan(SMALL, SPEC, tight_device())
    assert plan.notes[0] == "not simulated: torch is not installed here"


def test_without_a_gpu_jobs_run_on_the_cpu_if_torch_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Planner().machine() == FoundDevice(this_cpu(), "cpu")
    monkeypatch.setattr(planner, "has_torch", lambda: False)
    assert Planner().machine() is None
    with pytest.raises(InvalidRequest, match="QLORA_PLAN_DEVICE") as caught:
        Planner().device(None)
    assert caught.value.location == "/device"


def test_a_job_has_to_fit_the_smallest_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [Gpu(f"GPU-{size}", Device(f"{size} GB", size * GIB), size * GIB - 1) for size in (24, 12, 16)]
    monkeypatch.setattr(planner, "gpus", lambda visible: cards)
    assert Planner().machine() == FoundDevice(cards[1].device, "nvml")
    found = Planner().device(None)
    assert (found.device.name, found.found_by, found.free_now_bytes) == ("12 GB", "nvml", 12 * GIB - 1)


def test_device_of_remote_workers_is_a_setting() -> None:
    found = Planner("RTX 4090").machine()
    assert found is not None
    assert (found.device.name, found.found_by) == ("RTX 4090", "setting")
    assert Planner(UNKNOWN).machine() is None
    with pytest.raises(InvalidRequest, match="no device 'RTX 9999'"):
        Planner("RTX 9999")


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"hidden_size": "4096"}, "/config/hidden_size"),
        ({"num_hidden_layers": 10**9}, "/config/num_hidden_layers"),
        ({"num_attention_heads": True}, "/config/num_attention_heads"),
        ({"head_dim": 1.5}, "/config/head_dim"),
        ({"text_config": []}, "/config/text_config"),
        ({"text_config": {"vocab_size": -1}}, "/config/text_config/vocab_size"),
        ({"model_type": 7}, "/config/model_type"),
    ],
)
def test_invalid_config_is_refused_with_a_pointer_to_each_fault(changes: dict[str, Any], pointer: str) -> None:
    with pytest.raises(InvalidModel) as caught:
        shape_of({**CONFIG, **changes})
    assert [finding.pointer for finding in caught.value.findings] == [pointer]


def test_more_heads_than_features_are_refused() -> None:
    with pytest.raises(InvalidModel, match="5000 heads in 4096 features"):
        shape_of({**CONFIG, "num_attention_heads": 5000})


def test_adapter_that_cannot_be_attached_is_refused_and_checked_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(planner, "ATTACHMENT_TIMEOUT_S", 240.0)
    mixtral = family_config("mixtral").to_dict()
    spec = JobSpec.model_validate({"base_model": "m", "adapter": {"target_modules": ["w1"]}})
    with pytest.raises(InvalidSpec, match="without also targeting w3"):
        Planner(cache_dir=tmp_path).plan(mixtral, spec, Planner().device("24GB"))
    monkeypatch.setattr(planner, "ATTACHMENT_TIMEOUT_S", 0)
    with pytest.raises(InvalidSpec, match="without also targeting w3"):
        Planner(cache_dir=tmp_path).attachment(mixtral, spec)
    unchecked = Planner().attachment(mixtral, spec)
    assert unchecked is not None
    assert unchecked.unchecked == "no stored simulation has these settings"


def test_plain_models_and_prompt_methods_need_no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "Simulator", None)
    assert Planner().attachment(SMALL, SPEC) is None
    prompts = JobSpec.model_validate({"base_model": "m", "adapter": {"method": "prompt_tuning"}})
    assert Planner().attachment(family_config("mixtral").to_dict(), prompts) is None
