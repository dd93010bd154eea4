"""Plans from a config.json: what is asked of whom, and what the plan says of it. Two child processes in all."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_service.errors import InvalidModel, InvalidRequest
from qlora_service.planning import planner
from qlora_service.planning.cards import Device
from qlora_service.planning.hardware import Gpu, this_cpu
from qlora_service.planning.memory import GIB
from qlora_service.planning.planner import UNKNOWN, FoundDevice, Planner, shape_of
from qlora_service.specs import JobSpec
from tests.planning_models import MODELS, TIED, config

CONFIG = MODELS["Llama-2-7B"]
SMALL = config(64, 128, 2, 4, 2, 256, **TIED)
SPEC = JobSpec.model_validate({"base_model": "m", "training": {"max_seq_len_tokens": 64, "batch_size": 2}})


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no reason to fall back to the formula here."""
    monkeypatch.setattr(planner, "SIMULATION_S", 240.0)


def tight() -> FoundDevice:
    """A card about which the formula cannot decide for SMALL: it has what the job needs least, and no more."""
    card = Device("card", 24 * GIB)
    spec = SPEC.model_copy(update={"training": SPEC.training.model_copy(update={"gradient_checkpointing": True})})
    needs = Planner().plan(SMALL, spec, FoundDevice(card, "name"), simulates=False).memory.reserved
    return FoundDevice(replace(card, free_bytes=needs + GIB), "name")


def test_an_instant_plan_says_where_it_comes_from() -> None:
    made = Planner().plan(CONFIG, SPEC, Planner().device("RTX 3090"))
    assert (made.verdict, made.source, made.is_sure, list(made.notes)) == ("fits", "formula", True, [])
    assert made.reason.startswith("the job needs ")
    assert "RTX 3090 has 22.5 GiB for it" in made.reason


def test_a_plan_adds_up() -> None:
    told = Planner().plan(CONFIG, SPEC, Planner().device("24GB")).as_dict()
    memory = told["memory"]
    assert sum(memory["categories"].values()) == memory["allocated"] <= memory["reserved"]
    assert memory["needed"] == memory["reserved"] + memory["optimizer_host"]
    assert memory["free"] == memory["usable"] - memory["needed"]
    assert told["trained_parameters"] * 4 == told["storage"]["adapter_bytes"]
    assert memory["needed"] < told["bf16_lora_bytes"] < told["full_fine_tuning_bytes"]
    assert told["full_fine_tuning_bytes"] > 16 * 6.7e9
    assert json.loads(json.dumps(told)) == told


def test_the_reason_of_a_refusal_names_the_largest_term_and_what_would_fit() -> None:
    made = Planner().plan(MODELS["LLaMA-65B"], SPEC, Planner().device("24GB"))
    assert made.verdict == "does_not_fit"
    assert "packed weights alone take 30.2 GiB" in made.reason
    assert made.largest is not None
    assert f"{made.largest.model} at most" in made.reason
    assert "batch_size" in made.reason


def test_the_reason_of_fits_if_names_the_changes() -> None:
    spec = JobSpec.model_validate(
        {"base_model": "m", "training": {"max_seq_len_tokens": 4096, "gradient_checkpointing": False}}
    )
    made = Planner().plan(CONFIG, spec, Planner().device("12GB"))
    assert made.verdict == "fits_if"
    assert "set training.gradient_checkpointing to auto; or training.max_seq_len_tokens to " in made.reason


def test_a_simulation_is_kept_for_the_next_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tight()
    first = Planner(cache_dir=tmp_path).plan(SMALL, SPEC, found)
    assert first.source == "simulation"
    assert first.is_sure
    monkeypatch.setattr(planner, "SIMULATION_S", 0.001)  # too short for any child
    again = Planner(cache_dir=tmp_path).plan(SMALL, SPEC, found)
    assert again.as_dict() == first.as_dict()


def test_what_cannot_be_simulated_is_told_and_a_probe_advised() -> None:
    unheard_of = {**CONFIG, "model_type": "unheard_of"}
    made = Planner().plan(unheard_of, SPEC, Planner().device("24GB"))
    assert (made.verdict, made.source, made.is_sure) == ("fits", "formula", False)
    assert "unheard_of" in made.notes[0]
    assert "does not know the architecture" in made.notes[0]
    assert any("probe" in note for note in made.notes)


def test_plans_do_not_simulate_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "PATIENCE_S", 0.01)
    busy = Planner()
    turn: threading.Lock = busy._turn
    with turn:
        made = busy.plan(SMALL, SPEC, tight())
    assert (made.source, made.is_sure) == ("formula", False)
    assert "other plans are being simulated" in made.notes[0]


def test_without_torch_nothing_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "trains_here", lambda: False)
    made = Planner().plan(SMALL, SPEC, tight())
    assert made.notes[0] == "not simulated: torch is not installed here"


def test_without_a_gpu_jobs_run_on_the_cpu_if_torch_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Planner().machine() == FoundDevice(this_cpu(), "cpu")
    monkeypatch.setattr(planner, "trains_here", lambda: False)
    assert Planner().machine() is None
    with pytest.raises(InvalidRequest, match="QLORA_PLAN_DEVICE") as caught:
        Planner().device(None)
    assert caught.value.location == "/device"


def test_a_job_has_to_fit_the_smallest_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [Gpu(f"GPU-{size}", Device(f"{size} GB", size * GIB), size * GIB - 1) for size in (24, 12, 16)]
    monkeypatch.setattr(planner, "gpus", lambda visible: cards)
    assert Planner().machine() == FoundDevice(cards[1].device, "nvml")
    looked = Planner().device(None)
    assert (looked.device.name, looked.found_by, looked.free_now_bytes) == ("12 GB", "nvml", 12 * GIB - 1)


def test_the_operator_says_what_workers_elsewhere_have() -> None:
    told = Planner("RTX 4090").machine()
    assert told is not None
    assert (told.device.name, told.found_by) == ("RTX 4090", "setting")
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
def test_a_made_up_config_is_refused_with_its_places(changes: dict[str, Any], pointer: str) -> None:
    with pytest.raises(InvalidModel) as caught:
        shape_of({**CONFIG, **changes})
    assert [finding.pointer for finding in caught.value.findings] == [pointer]


def test_more_heads_than_features_cannot_be() -> None:
    with pytest.raises(InvalidModel, match="5000 heads in 4096 features"):
        shape_of({**CONFIG, "num_attention_heads": 5000})
