"""The largest step of a job, its memory, and that tracking it changes no weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_service.models.adapters import trainable_parameters
from qlora_service.planning.simulation.run import Simulator
from qlora_service.specs import Lora, Supervised, Training, parse_spec
from qlora_service.training.evaluation.row_losses import RowLosses
from qlora_service.training.loop import AroundStep, Unattended, Workload, train
from qlora_service.training.network.network import Network
from qlora_service.training.objectives import make_objective
from tests.tiny_training import Recorder, load, network, rows
from tests.workspace import Workspace, job_spec
from workers.trainer.step_memory import TrackedStep, find_largest_step

STEPS = 4


def test_the_largest_step_has_the_largest_micro_batch_not_the_largest_sum() -> None:
    lengths = [10, 10, 10, 10, 10, 10, 10, 10, 16, 1]
    steps = [[0, 1, 2], [3, 4, 5], [6, 7, 9], [8, 9], [8, 9]]
    assert find_largest_step(lengths, steps.__getitem__, 20, range(5)) == 1  # two rows of 10 in one micro-batch
    assert find_largest_step(lengths, steps.__getitem__, 19, range(5)) == 3  # rows of 16 and 1
    assert find_largest_step(lengths, steps.__getitem__, 4, range(5)) == 3  # a row of 16 alone


def test_the_first_step_is_chosen_only_without_another() -> None:
    lengths, steps = [50, 10, 10], [[0], [1], [2]]
    assert find_largest_step(lengths, steps.__getitem__, 100, range(3)) == 1
    assert find_largest_step(lengths, steps.__getitem__, 100, range(1)) == 0
    assert find_largest_step(lengths, steps.__getitem__, 100, range(2, 3)) == 2  # a later attempt


def trained(model_dir: Path, around: Callable[[Network], AroundStep | None]) -> dict[str, torch.Tensor]:
    """The adapter's weights after a few steps with dropout."""
    model = load(model_dir, adapter=Lora(r=4, lora_dropout=0.1))
    examples = rows(12)
    net = network(model)
    around_step = around(net)
    control = Unattended()
    if around_step is not None:
        setattr(control, "around_step", around_step)  # noqa: B010 - a method of this object only
    train(
        net,
        make_objective(Supervised()),
        Workload(lambda step: examples[3 * step : 3 * step + 3], examples[:2], STEPS, evaluate_every=2),
        Training(batch_size=3, micro_batch_tokens=64, learning_rate=1e-2),
        Recorder(),
        RowLosses(),
        control=control,
    )
    assert not any(parameter._post_accumulate_grad_hooks for parameter in trainable_parameters(model))  # type: ignore[attr-defined]
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("step", [0, 2])
def test_tracked_step_gives_the_same_weights_bit_for_bit(tiny_model: Path, step: int) -> None:
    peaks: list[dict[str, Any]] = []
    plain = trained(tiny_model, lambda _: None)
    tracked = trained(tiny_model, lambda net: TrackedStep(net, step, peaks.append))
    assert plain.keys() == tracked.keys()
    assert all(torch.equal(plain[name], tracked[name]) for name in plain)
    (memory,) = peaks
    assert memory["source"] == f"tensors of step {step + 1}"
    assert memory["allocated"] > sum(p.nbytes for p in load(tiny_model).parameters())


def test_recorded_memory_is_within_a_percent_of_the_simulation(tmp_path: Path, tiny_model: Path) -> None:
    workspace = Workspace(tmp_path / "data", tiny_model)
    row = {"instruction": "Say it again and again and again.", "output": "It is said again and again, as you asked."}

    def measured(**training: Any) -> dict[str, Any]:
        # Predictions assume that every token is trained.
        spec = job_spec(max_steps=3, batch_size=4, train_on="all", **training) | {"dataset": {"rows": [row] * 20}}
        record = workspace.wait_for_end(workspace.submit_spec(spec)).measured
        assert record is not None
        return record

    with workspace.worker():
        first = measured(micro_batch_tokens=1000)
        predicted = first["predicted"]["memory"]
        assert predicted["source"] == "formula"
        # The simulation of a planned job with two full micro-batches per step is cached.
        settings = {name: predicted[name] for name in ("checkpointing", "compute_dtype", "longest_tokens")}
        settings["micro_batch_tokens"] = 2 * predicted["longest_tokens"]
        simulated = Simulator(timeout_s=60, cache_dir=workspace.settings.plan_cache_dir).simulate(
            json.loads((tiny_model / "config.json").read_text()),
            parse_spec(job_spec(batch_size=4)),
            cuda=False,
            **settings,
        )
        second = measured(micro_batch_tokens=settings["micro_batch_tokens"])
    assert second["predicted"]["memory"] == {"allocated": simulated.allocated, "source": "simulation", **settings}
    assert second["actual"]["memory"]["allocated"] == pytest.approx(simulated.allocated, rel=0.01)
    assert second["actual"]["memory"]["allocated"] < first["actual"]["memory"]["allocated"]
    assert second["device"].endswith("CPU")
