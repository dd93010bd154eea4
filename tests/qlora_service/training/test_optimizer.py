"""Optimizer state, parameter groups, and the learning rate schedule against transformers."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import GlobalPageManager
from transformers import Trainer, get_scheduler

from qlora_service.errors import JobFailed
from qlora_service.specs import Training
from qlora_service.training.optimizer import (
    learning_rate,
    make_optimizer,
    may_leave_paged_memory,
    optimizer_state,
    release_optimizer,
    restore_optimizer,
    set_learning_rate,
)

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]
OPTIMIZERS = get_args(Training.model_fields["optim"].annotation)


class Weights(torch.nn.Module):
    """Parameters like those of adapters: matrices above and below 4,096 elements, a vector, and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(shape, generator=generator))

        self.lora_A = torch.nn.ParameterDict({"default": parameter(16, 512)})
        self.lora_B = torch.nn.ParameterDict({"default": parameter(64, 16)})
        self.lora_embedding_B = torch.nn.ParameterDict({"default": parameter(96, 64)})
        self.lora_magnitude_vector = torch.nn.ParameterDict({"default": parameter(300)})
        self.weight = torch.nn.Parameter(torch.ones(8, 8), requires_grad=False)


def take_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Takes optimizer steps with gradients that depend on the step alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_learning_rate(optimizer, 0.01 / (step + 1))
        optimizer.step()


def settings(optim: str, **changes: Any) -> Training:
    return Training(optim=optim, **({"weight_decay": 0.1, "loraplus_lr_ratio": 4.0} | changes))


def first_half(optim: str) -> dict[str, Any]:
    """Weights and optimizer state after three steps."""
    model = Weights()
    optimizer = make_optimizer(model, settings(optim), CPU)
    take_steps(model, optimizer, range(3))
    return {"weights": model.state_dict(), "optimizer": optimizer_state(optimizer)}


def second_half(saved: dict[str, Any], optim: str) -> dict[str, torch.Tensor]:
    """The weights after three more steps."""
    model = Weights()
    model.load_state_dict(saved["weights"])
    optimizer = make_optimizer(model, settings(optim), CPU)
    restore_optimizer(optimizer, saved["optimizer"])
    take_steps(model, optimizer, range(3, 6))
    return model.state_dict()


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """By optimizer, the final weights of a new process that resumed from a file."""
    saved, final = (tmp_path_factory.mktemp("state") / name for name in ("saved.pt", "final.pt"))
    torch.save({optim: first_half(optim) for optim in OPTIMIZERS}, saved)
    script = f"""
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("resumer", {__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
saved = torch.load(sys.argv[1], weights_only=True)
torch.save({{optim: module.second_half(state, optim) for optim, state in saved.items()}}, sys.argv[2])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script, saved, final], check=True, env=environment, cwd=ROOT)
    weights: dict[str, dict[str, torch.Tensor]] = torch.load(final, weights_only=True)
    return weights


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_six_steps_equal_three_and_three_in_a_new_process(
    optim: str, resumed: dict[str, dict[str, torch.Tensor]]
) -> None:
    model = Weights()
    take_steps(model, make_optimizer(model, settings(optim), CPU), range(6))
    for name, weight in model.state_dict().items():
        assert torch.equal(resumed[optim][name], weight), name


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_state_consists_of_plain_copies_on_the_cpu(optim: str) -> None:
    model = Weights()
    optimizer = make_optimizer(model, settings(optim), CPU)
    assert optimizer_state(optimizer) == {}
    take_steps(model, optimizer, range(1))
    saved = optimizer_state(optimizer)
    assert set(saved) == {name for name, p in model.named_parameters() if p.requires_grad}
    copies = {name: {key: value.clone() for key, value in state.items()} for name, state in saved.items()}
    take_steps(model, optimizer, range(1, 2))
    for name, state in saved.items():
        for key, value in state.items():
            assert type(value) is torch.Tensor
            assert value.device == CPU
            assert torch.equal(value, copies[name][key]), (name, key)


def test_parameters_without_state_have_none_after_a_restore() -> None:
    model = Weights()
    optimizer = make_optimizer(model, settings("paged_adamw_8bit"), CPU)
    model.lora_A["default"].grad = torch.ones(16, 512)
    optimizer.step()
    restored = make_optimizer(model, settings("paged_adamw_8bit"), CPU)
    restore_optimizer(restored, optimizer_state(optimizer))
    assert list(restored.state) == [model.lora_A["default"]]


@pytest.mark.parametrize(
    ("saved_by", "restored_by"),
    [
        ("paged_adamw_32bit", "paged_adamw_8bit"),
        ("adamw_torch", "paged_adamw_32bit"),
        ("paged_adamw_32bit", "adamw_torch"),
        ("paged_lion_32bit", "paged_adamw_32bit"),
    ],
)
def test_state_of_another_optimizer_is_refused(saved_by: str, restored_by: str) -> None:
    with pytest.raises(JobFailed, match="does not fit this job's optimizer"):
        second_half(first_half(saved_by), restored_by)


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "adamw_torch"])
def test_state_of_another_shape_is_refused(optim: str) -> None:
    saved = first_half(optim)
    state = saved["optimizer"]["lora_B.default"]
    saved["optimizer"]["lora_B.default"] = {key: value[:1] if value.ndim else value for key, value in state.items()}
    with pytest.raises(JobFailed, match=r"lora_B\.default"):
        second_half(saved, optim)


def test_state_of_an_unknown_parameter_is_refused() -> None:
    saved = first_half("adamw_torch")
    saved["optimizer"]["lora_C.default"] = saved["optimizer"]["lora_B.default"]
    with pytest.raises(JobFailed, match=r"lora_C\.default .* the model does not train it"):
        second_half(saved, "adamw_torch")


@pytest.mark.parametrize(
    ("optim", "kind", "dtype", "states"),
    [
        ("paged_adamw_32bit", bnb.optim.AdamW, torch.float32, 2),
        ("paged_adamw_8bit", bnb.optim.AdamW, torch.uint8, 2),
        ("adamw_8bit", bnb.optim.AdamW, torch.uint8, 2),
        ("paged_lion_32bit", bnb.optim.Lion, torch.float32, 1),
        ("paged_lion_8bit", bnb.optim.Lion, torch.uint8, 1),
    ],
)
def test_each_name_gives_the_bitsandbytes_optimizer_with_its_bits_and_paging(
    optim: str, kind: type[torch.optim.Optimizer], dtype: torch.dtype, states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Weights()
    optimizer = make_optimizer(model, settings(optim), CPU)
    assert isinstance(optimizer, kind)
    assert optimizer.is_paged is False  # a CPU has no managed memory
    take_steps(model, optimizer, range(1))
    state = optimizer.state[model.lora_A["default"]]
    assert state["state1"].dtype == dtype
    assert ("state2" in state) is (states == 2)
    # Below 4,096 elements bitsandbytes keeps 32-bit state.
    assert optimizer.state[model.lora_B["default"]]["state1"].dtype == torch.float32
    monkeypatch.setattr("qlora_service.training.optimizer.can_page", lambda device: True)
    assert make_optimizer(model, settings(optim), CPU).is_paged is optim.startswith("paged")


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_paged_memory_is_left_if_a_large_weight_is_paged(optim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = torch.nn.Linear(500, 200), torch.nn.Linear(499, 200)
    assert not may_leave_paged_memory(large, settings(optim), CPU)
    monkeypatch.setattr("qlora_service.training.optimizer.can_page", lambda device: True)
    assert may_leave_paged_memory(large, settings(optim), CPU) is optim.startswith("paged")
    assert not may_leave_paged_memory(small, settings(optim), CPU)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_the_optimizer_has_every_setting(optim: str) -> None:
    model = Weights()
    optimizer = make_optimizer(model, settings(optim, adam_beta1=0.5, adam_beta2=0.7), CPU)
    scale_and_decay = {
        name: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert scale_and_decay == {
        "lora_A.default": (1.0, 0.1),
        "lora_B.default": (4.0, 0.1),
        "lora_embedding_B.default": (4.0, 0.1),
        "lora_magnitude_vector.default": (1.0, 0.0),
    }
    assert {tuple(group["betas"]) for group in optimizer.param_groups} == {(0.5, 0.7)}
    assert {group["lr"] / group["lr_scale"] for group in optimizer.param_groups} == {2e-4}


def test_weight_decay_applies_to_the_matrices_of_transformers() -> None:
    model = Weights()
    transformers_names = set(Trainer.get_decay_parameter_names(None, model)) - {"weight"}
    decayed = {
        name
        for group in make_optimizer(model, settings("adamw_torch"), CPU).param_groups
        if group["weight_decay"]
        for name in group["param_names"]
    }
    assert transformers_names - decayed == {"lora_magnitude_vector.default"}
    assert decayed < transformers_names


def test_the_rate_of_a_group_is_scaled() -> None:
    model = Weights()
    optimizer = make_optimizer(model, settings("adamw_torch", weight_decay=0.0), CPU)
    set_learning_rate(optimizer, 0.5)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.5, 2.0]
    (group,) = make_optimizer(model, Training(), CPU).param_groups
    assert (group["lr_scale"], len(group["params"])) == (1.0, 4)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_step_changes_b_by_its_own_rate(optim: str) -> None:
    """The first step of AdamW and Lion is the rate times the gradient's sign, whatever its size."""
    model = Weights()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make_optimizer(model, settings(optim, weight_decay=0.0), CPU)
    take_steps(model, optimizer, range(1))
    for name, rate in {"lora_A.default": 0.01, "lora_B.default": 0.04, "lora_magnitude_vector.default": 0.01}.items():
        change = (model.state_dict()[name] - before[name]).abs()
        assert change.median() == pytest.approx(rate, rel=1e-3), name
    assert torch.equal(model.weight, before["weight"])


def test_the_first_step_of_bitsandbytes_adamw_equals_that_of_torch() -> None:
    updated = []
    for optim in ("paged_adamw_32bit", "adamw_torch"):
        model = Weights()
        take_steps(model, make_optimizer(model, settings(optim), CPU), range(1))
        updated.append(model.state_dict())
    assert all(torch.allclose(updated[0][name], updated[1][name], atol=1e-6) for name in updated[0])


@pytest.mark.parametrize("end", ["with release_optimizer", "without"])
def test_overrides_of_a_former_job_do_not_affect_a_new_one(end: str) -> None:
    model = Weights()
    former = make_optimizer(model, settings("paged_adamw_32bit"), CPU)
    bnb.optim.GlobalOptimManager.get_instance().override_config(model.lora_A["default"], "optim_bits", 8)
    if end == "with release_optimizer":
        release_optimizer(former)
        assert bnb.optim.GlobalOptimManager.get_instance().pid2config == {}
    new = make_optimizer(model, settings("paged_adamw_32bit"), CPU)
    take_steps(model, new, range(1))
    assert new.state[model.lora_A["default"]]["state1"].dtype == torch.float32


def test_released_state_has_no_references() -> None:
    model = Weights()
    optimizer = make_optimizer(model, settings("paged_adamw_32bit"), CPU)
    take_steps(model, optimizer, range(1))
    GlobalPageManager.get_instance().paged_tensors.append(torch.zeros(1))
    release_optimizer(optimizer)
    assert optimizer_state(optimizer) == {}
    assert GlobalPageManager.get_instance().paged_tensors == []


# --- the schedule


def rates(training: Training, steps: int) -> list[float]:
    return [learning_rate(step, steps, training) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 7), (3, 20), (19, 20)])
def test_schedules_equal_those_of_transformers_after_the_warmup(schedule: str, warmup: int, steps: int) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    reference = []
    for _ in range(steps):
        reference.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    actual = rates(Training(learning_rate=0.5, lr_scheduler_type=schedule, warmup_steps=warmup), steps)
    assert actual[warmup:] == pytest.approx(reference[warmup:], rel=1e-12)
    # The warmup differs: transformers' starts at zero and rises in steps of 1/warmup.
    assert reference[:warmup] == pytest.approx([0.5 * step / warmup for step in range(warmup)])
    assert actual[:warmup] == pytest.approx([0.5 * (step + 1) / (warmup + 1) for step in range(warmup)])


def test_constant_has_a_warmup_and_stays() -> None:
    assert rates(Training(learning_rate=0.4, warmup_ratio=0.3), 10) == pytest.approx([0.1, 0.2, 0.3] + [0.4] * 7)


def test_no_warmup_starts_at_the_rate() -> None:
    assert rates(Training(learning_rate=0.4, warmup_ratio=0.0), 3) == [0.4, 0.4, 0.4]


def test_warmup_steps_override_the_ratio() -> None:
    assert rates(Training(learning_rate=0.4, warmup_ratio=0.9, warmup_steps=1), 3) == pytest.approx([0.2, 0.4, 0.4])
    assert rates(Training(learning_rate=0.4, warmup_ratio=0.9, warmup_steps=0), 2) == [0.4, 0.4]


def test_a_job_shorter_than_its_warmup_rises_until_its_end() -> None:
    training = Training(learning_rate=1.0, warmup_steps=9, lr_scheduler_type="linear")
    assert rates(training, 4) == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_the_first_rate_is_above_zero() -> None:
    assert all(rate > 0 for rate in rates(Training(warmup_ratio=0.9, lr_scheduler_type="linear"), 20))


def test_warmup_is_rounded_up_and_the_decay_starts_after_it() -> None:
    assert rates(Training(learning_rate=0.4, warmup_ratio=0.25), 10)[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    falling = Training(learning_rate=1.0, warmup_ratio=0.5, lr_scheduler_type="linear")
    assert rates(falling, 4) == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5])
    assert math.isclose(learning_rate(4, 4, falling), 0.0)
