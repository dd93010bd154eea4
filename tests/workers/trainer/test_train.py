"""The training of an attempt: settings, interruption and resume, memory and disk space."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

import workers.trainer.load
import workers.trainer.train
from qlora_service.artifacts.manifest import Manifest
from qlora_service.domain.jobs import FailureReason
from qlora_service.errors import Interrupted, JobFailed
from qlora_service.training.checkpoint.checkpoints import Checkpoints
from qlora_service.training.checkpoint.disk_reserve import RESERVE_FILE, DiskReserve
from qlora_service.training.network.network import Network
from qlora_service.training.sizes import DATABASE_BYTES
from tests.workers.trainer._attempts import (
    AttemptRecorder,
    interrupted_after,
    make_inputs,
    next_inputs,
    published_bytes,
    run,
    spy_on_loop,
)
from tests.workspace import Workspace
from workers.disk_space import is_disk_full
from workers.trainer.context import AttemptInputs
from workers.trainer.load import make_network


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_spec_reaches_the_training(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    arguments = spy_on_loop(monkeypatch)
    run(make_inputs(workspace, workspace.submit(seed=0)))
    first = arguments["first_a"]
    settings = {"max_steps": None, "epochs": 0.3, "seed": 7, "micro_batch_tokens": 77}
    run(make_inputs(workspace, workspace.submit(**settings, gradient_checkpointing=checkpointing)))
    assert arguments["total_steps"] == 3  # 11 of 38 rows, 4 a step
    assert arguments["training"].micro_batch_tokens == 77
    assert arguments["training"].seed == 7
    assert arguments["network"].checkpointing is checkpointing
    assert not any(torch.equal(a, first[name]) for name, a in arguments["first_a"].items())


def test_gradients_that_stay_infinite_end_the_job_and_the_last_finite_adapter_is_kept(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(workspace, workspace.submit(max_steps=9))
    finite: list[dict[str, torch.Tensor]] = []

    def breaking_after_two_steps(*given: Any) -> Network:
        network = make_network(*given)
        trainable = [p for p in network.model.parameters() if p.requires_grad]
        steps = 0

        def grow(gradient: torch.Tensor) -> torch.Tensor:
            nonlocal steps
            steps += 1
            if steps == 3:
                state = get_peft_model_state_dict(network.model)
                finite.append({name: tensor.clone() for name, tensor in state.items()})
            return gradient if steps <= 2 else gradient * float("inf")

        trainable[1].register_hook(grow)
        return network

    monkeypatch.setattr(workers.trainer.load, "make_network", breaking_after_two_steps)
    with pytest.raises(JobFailed, match="step 5, and the 2 before it") as failure:
        run(inputs)
    assert failure.value.details["reason"] == FailureReason.NOT_FINITE
    assert failure.value.details["kept_step"] == 2
    assert len(failure.value.details["lines"]) == 4
    (inputs.scratch / "kept").write_bytes(published_bytes(inputs, "adapter_model.safetensors"))
    kept = load_file(inputs.scratch / "kept")
    assert kept.keys() == finite[0].keys()
    assert all(torch.equal(tensor, finite[0][name]) for name, tensor in kept.items())
    assert json.loads(published_bytes(inputs, "manifest.json"))["held_out"]["loss_after"] > 0


def test_the_attempt_after_an_interrupted_one_ends_with_the_same_bytes(workspace: Workspace) -> None:
    uninterrupted = make_inputs(workspace, workspace.submit(max_steps=6))
    run(uninterrupted)
    first = make_inputs(workspace, workspace.submit(max_steps=6))
    first_reporter = interrupted_after(4, first)
    assert first_reporter.saved_steps == [4]
    second = next_inputs(first, first_reporter.plan, workspace)
    reporter = AttemptRecorder()
    result = run(second, reporter=reporter)
    assert reporter.resumed_at == 4
    assert [metrics.step for metrics in reporter.steps] == [5, 6]
    for name in ("adapter_model.safetensors", "rows.jsonl", "held_out.jsonl"):
        assert published_bytes(second, name) == published_bytes(uninterrupted, name), name
    assert Manifest.model_validate_json(published_bytes(second, "manifest.json")).plan == first_reporter.plan
    assert result["warnings"] == []


def test_the_attempt_after_one_interrupted_after_training_repeats_no_step(workspace: Workspace) -> None:
    first = make_inputs(workspace, workspace.submit(max_steps=4))

    def stop(phase: str) -> None:
        if phase == "publishing":
            raise Interrupted("enough")

    first_reporter = AttemptRecorder(stop)
    with pytest.raises(Interrupted):
        run(first, reporter=first_reporter)
    reporter = AttemptRecorder()
    result = run(next_inputs(first, first_reporter.plan, workspace), reporter=reporter)
    assert reporter.steps == []
    assert (reporter.resumed_at, result["steps"], result["certificate"]["difference"]) == (4, 4, 0.0)


def test_an_attempt_without_a_checkpoint_restarts_with_the_stored_plan_and_reports_it(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_inputs(workspace, workspace.submit(max_steps=1, batch_size=8))
    first_reporter = AttemptRecorder()
    run(first, reporter=first_reporter)
    losses = Network.losses

    def limited(network: Network, documents: Any, **options: Any) -> Any:
        if network.model.training and sum(len(document.input_ids) for document in documents) > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(network, documents, **options)

    monkeypatch.setattr(Network, "losses", limited)
    shutil.rmtree(first.checkpoint_dir)
    reporter = AttemptRecorder()
    run(next_inputs(first, first_reporter.plan | {"micro_batch_tokens": 64}, workspace), reporter=reporter)
    assert reporter.resumed_at == 0
    assert reporter.plan["changes"] == []
    assert [metrics.step for metrics in reporter.steps] == [1]


def test_disk_space_is_reserved_for_missing_checkpoints_and_released_for_publishing(workspace: Workspace) -> None:
    first = make_inputs(workspace, workspace.submit(max_steps=4))
    reserved: list[dict[str, int]] = [{}, {}]

    def record(number: int, inputs: AttemptInputs) -> Callable[[str], object]:
        reserve = DiskReserve(inputs.checkpoint_dir / RESERVE_FILE)
        return lambda phase: reserved[number].update({phase: reserve.held_bytes})

    def stop(phase: str) -> None:
        record(0, first)(phase)
        if phase == "publishing":
            raise Interrupted("enough")

    first_reporter = AttemptRecorder(stop)
    with pytest.raises(Interrupted):
        run(first, reporter=first_reporter)
    existing = Checkpoints(first.checkpoint_dir, 2).bytes_on_disk()
    second = next_inputs(first, first_reporter.plan, workspace)
    run(second, record(1, second))
    assert reserved[1]["training"] == reserved[0]["training"] - existing
    assert reserved[1]["training"] > DATABASE_BYTES
    assert (reserved[1]["publishing"] > 0, reserved[1]["certifying"]) == (True, 0)


def test_running_out_of_memory_changes_the_plan_and_is_reported(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, failed = Network.losses, []

    def out_of_memory_once(network: Network, documents: Any, **options: Any) -> Any:
        if network.model.training and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(network, documents, **options)

    inputs = make_inputs(workspace, workspace.submit(max_steps=3, batch_size=8))
    monkeypatch.setattr(Network, "losses", out_of_memory_once)
    monkeypatch.setattr(Network, "fits", lambda *_: True)
    reporter = AttemptRecorder()
    result = run(inputs, reporter=reporter)
    (change,) = reporter.plan["changes"]
    assert change["what"] == "micro_batch_tokens"
    assert reporter.plan["micro_batch_tokens"] == change["to"] < change["from"]
    assert any("micro_batch_tokens" in warning for warning in result["warnings"])
    assert Manifest.model_validate_json(published_bytes(inputs, "manifest.json")).plan == reporter.plan


def test_a_job_without_enough_disk_space_does_not_begin(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(workspace.settings.data_dir).free
    monkeypatch.setattr(workers.trainer.train, "expected_bytes", lambda *_, **__: free)
    reporter = AttemptRecorder()
    with pytest.raises(OSError) as raised:  # noqa: PT011 - identified by its errno
        run(make_inputs(workspace, workspace.submit()), reporter=reporter)
    assert is_disk_full(raised.value)
    assert reporter.steps == reporter.evaluations == []
