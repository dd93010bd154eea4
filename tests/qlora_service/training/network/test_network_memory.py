"""Memory of a forward pass, and checks between the layers that can interrupt it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

from qlora_service.errors import Interrupted
from tests.network_cases import BOTH_PATHS
from tests.tiny_training import gradients, load, network, rows

DOCUMENTS = rows(6)
LAYERS = 2
"""Decoder layers of the tiny model"""


@BOTH_PATHS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_is_computed_for_a_frozen_embedding(tiny_model: Path, fast: bool, checkpointing: bool) -> None:
    """The gradient would cost the first layer's products with its frozen weights, and nothing would use it."""
    model = load(tiny_model).train()
    net = network(model, fast=fast, checkpointing=checkpointing)
    outputs: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: outputs.append(output))
    net.losses(DOCUMENTS).nll.sum().backward()
    assert not outputs[0].requires_grad


@BOTH_PATHS
def test_recomputation_keeps_less_than_half(tiny_model: Path, fast: bool) -> None:
    net = network(load(tiny_model).train(), fast=fast)
    without_recomputation = net.activation_bytes(64)
    assert net.activation_bytes(128) == pytest.approx(2 * without_recomputation, rel=0.3)
    assert net.checkpoint()
    assert net.activation_bytes(64) < without_recomputation / 2


def test_the_fast_path_keeps_less_than_the_general_one(tiny_model: Path) -> None:
    fast, general = (network(load(tiny_model).train(), fast=fast).activation_bytes(64) for fast in (True, False))
    assert fast < 0.9 * general


def test_a_micro_batch_fits_if_half_of_the_free_memory_holds_it(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network(load(tiny_model).train())
    needed = net.activation_bytes(64) // 64 * 640
    for free, fits in ((1.9 * needed, False), (2.2 * needed, True)):
        monkeypatch.setattr("qlora_service.training.network.network.free_memory_bytes", lambda device, free=free: free)
        assert net.fits(640) is fits
    assert not network(load(tiny_model).train()).fits(1 << 40)


def test_the_probe_leaves_the_model_as_it_was(tiny_model: Path) -> None:
    for training in (True, False):
        model = load(tiny_model).train(training)
        net = network(model)
        assert model.training is training
        assert gradients(model) == {}
        net.fits(100)
        assert gradients(model) == {}


@BOTH_PATHS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_check_runs_before_each_layer_forward_and_backward(tiny_model: Path, fast: bool, checkpointing: bool) -> None:
    net = network(load(tiny_model).train(), fast=fast, checkpointing=checkpointing)
    checks: list[str] = []
    direction = "forward"
    with net.before_each_layer(lambda: checks.append(direction)):
        loss = net.losses(DOCUMENTS).nll.sum()
        assert checks == ["forward"] * LAYERS
        direction = "backward"
        loss.backward()
    # The first layer's input has no gradient, because nothing before it is trained.
    assert checks.count("backward") >= LAYERS - 1
    checks.clear()
    net.losses(DOCUMENTS).nll.sum().backward()
    assert checks == []


@BOTH_PATHS
def test_an_interrupt_at_any_layer_leaves_the_next_step_unchanged(tiny_model: Path, fast: bool) -> None:
    """The check's exception arrives unchanged, and the next step's gradients equal those without an interrupt."""
    net = network(load(tiny_model, perturb_b=0.05).train(), fast=fast)

    def step() -> dict[str, torch.Tensor]:
        net.losses(DOCUMENTS).nll.sum().backward()
        result = gradients(net.model)
        net.model.zero_grad(set_to_none=True)
        return result

    expected = step()
    for last in range(1, 2 * LAYERS):
        calls = count(1)

        def check(last: int = last, calls: Iterator[int] = calls) -> None:
            if next(calls) == last:
                raise Interrupted("here")

        with pytest.raises(Interrupted, match="here"), net.before_each_layer(check):
            step()
        net.model.zero_grad(set_to_none=True)
        for name, gradient in step().items():
            assert torch.equal(gradient, expected[name]), name
