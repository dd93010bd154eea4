from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch

from qlora_service.specs import Training
from qlora_service.training.optimizer import learning_rate, make_optimizer
from tests.tiny_training import CPU


def rates(training: Training, steps: int) -> list[float]:
    return [learning_rate(step, steps, training) for step in range(steps)]


def test_constant_rises_and_stays() -> None:
    assert rates(Training(learning_rate=0.4, warmup_ratio=0.3), 10) == pytest.approx([0.1, 0.2, 0.3] + [0.4] * 7)


def test_no_warmup_starts_at_the_rate() -> None:
    assert rates(Training(learning_rate=0.4, warmup_ratio=0.0), 3) == [0.4, 0.4, 0.4]


def test_linear_falls_evenly_to_zero_after_the_last_step() -> None:
    training = Training(learning_rate=1.0, warmup_ratio=0.0, lr_scheduler_type="linear")
    assert rates(training, 4) == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_cosine_is_half_in_the_middle() -> None:
    training = Training(learning_rate=1.0, warmup_ratio=0.0, lr_scheduler_type="cosine")
    assert rates(training, 4)[2] == pytest.approx(0.5)
    assert rates(training, 4)[0] == 1.0


def test_the_first_step_always_moves() -> None:
    assert all(rate > 0 for rate in rates(Training(warmup_ratio=0.9, lr_scheduler_type="linear"), 20))


@pytest.mark.parametrize(("name", "bits"), [("paged_adamw_32bit", 32), ("paged_adamw_8bit", 8)])
def test_paged_names_are_bitsandbytes_adamw(name: str, bits: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(128, 64))
    optimizer = make_optimizer([parameter], Training(optim=name), CPU)
    assert isinstance(optimizer, bnb.optim.AdamW)
    assert optimizer.args.optim_bits == bits
    assert optimizer.is_paged is False  # a CPU has nothing to page to
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter]["state1"]
    assert state.dtype == (torch.float32 if bits == 32 else torch.uint8)


def test_bitsandbytes_adamw_takes_the_same_first_step_as_torchs() -> None:
    moved = []
    for name in ("paged_adamw_32bit", "adamw_torch"):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(64, 64))
        optimizer = make_optimizer([parameter], Training(optim=name, weight_decay=0.1), CPU)
        parameter.grad = torch.randn(64, 64)
        optimizer.step()
        moved.append(parameter.detach().clone())
    assert torch.allclose(moved[0], moved[1], atol=1e-6)


def test_warmup_is_rounded_up_and_the_fall_starts_after_it() -> None:
    def rates(training: Training, steps: int) -> list[float]:
        return [learning_rate(step, steps, training) for step in range(steps)]

    assert rates(Training(learning_rate=0.4, warmup_ratio=0.25), 10)[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    falling = Training(learning_rate=1.0, warmup_ratio=0.5, lr_scheduler_type="linear")
    assert rates(falling, 4) == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5])


@pytest.mark.parametrize("name", ["paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch"])
def test_the_optimizer_gets_every_setting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_service.training.optimizer.can_page", lambda device: True)
    training = Training(optim=name, adam_beta1=0.5, adam_beta2=0.7, weight_decay=0.1)
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(8, 8))], training, CPU)
    (group,) = optimizer.param_groups
    assert (tuple(group["betas"]), group["weight_decay"]) == ((0.5, 0.7), 0.1)
    assert name == "adamw_torch" or optimizer.is_paged is True
