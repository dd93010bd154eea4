"""Paged optimizer state on a CUDA device. Expected figures are in the tests, which are skipped by name without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import GlobalPageManager

from qlora_service.specs import Training
from qlora_service.training.device import choose_device
from qlora_service.training.optimizer import make_optimizer, optimizer_state, release_optimizer, restore_optimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PAGED = {"large": True, "small": False}
"""State of 160,000 elements pages; a LoRA of rank 16 on 4,096 features has 65,536, which do not"""
STATES = {"paged_adamw_32bit": 2, "paged_adamw_8bit": 2, "paged_lion_32bit": 1, "paged_lion_8bit": 1}


class Weights(torch.nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.large = torch.nn.Parameter(torch.ones(400, 400, device=device))
        self.small = torch.nn.Parameter(torch.ones(16, 4096, device=device))


def take_steps(model: Weights, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        optimizer.step()


def paged(model: Weights, optimizer: torch.optim.Optimizer) -> dict[str, bool]:
    states: dict[str, dict[str, Any]] = {name: optimizer.state[p] for name, p in model.named_parameters()}
    return {name: getattr(state["state1"], "is_paged", False) for name, state in states.items()}


@pytest.mark.parametrize("optim", STATES)
def test_states_of_100_000_elements_page_also_after_a_restore(optim: str) -> None:
    device = choose_device()
    uninterrupted, first = Weights(device), Weights(device)
    training = Training(optim=optim)
    take_steps(uninterrupted, make_optimizer(uninterrupted, training, device), range(6))

    optimizer = make_optimizer(first, training, device)
    take_steps(first, optimizer, range(3))
    assert paged(first, optimizer) == PAGED
    saved = optimizer_state(optimizer)
    assert {value.device.type for state in saved.values() for value in state.values()} == {"cpu"}
    assert not any(hasattr(value, "is_paged") for state in saved.values() for value in state.values())
    release_optimizer(optimizer)
    assert GlobalPageManager.get_instance().paged_tensors == []

    resumed = Weights(device)
    resumed.load_state_dict(first.state_dict())
    restored = make_optimizer(resumed, training, device)
    restore_optimizer(restored, saved)
    assert paged(resumed, restored) == PAGED
    assert len(GlobalPageManager.get_instance().paged_tensors) == STATES[optim]
    take_steps(resumed, restored, range(3, 6))
    assert paged(resumed, restored) == PAGED
    for name, weight in uninterrupted.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name
    release_optimizer(restored)


def test_unpaged_adamw_never_pages() -> None:
    device = choose_device()
    model = Weights(device)
    optimizer = make_optimizer(model, Training(optim="adamw_8bit"), device)
    take_steps(model, optimizer, range(1))
    assert paged(model, optimizer) == {"large": False, "small": False}
