"""The base and the plan of an attempt: devices, cached bases, inherited plans."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import workers.trainer.load
import workers.warm_base
from qlora_service.artifacts.manifest import Manifest
from qlora_service.domain.jobs import FailureReason
from qlora_service.errors import JobFailed
from qlora_service.models.base.quantized_cache import QuantizedCache
from qlora_service.training.network.network import Network
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
from workers.trainer.context import AttemptInputs


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available")
def test_an_attempt_for_an_unusable_gpu_fails_instead_of_using_the_cpu(workspace: Workspace) -> None:
    inputs = make_inputs(workspace, workspace.submit())
    with pytest.raises(JobFailed, match="cannot use it") as failure:
        run(AttemptInputs(**{**vars(inputs), "needs_gpu": True}))
    assert failure.value.details["reason"] == FailureReason.DEVICE_UNAVAILABLE


def test_the_next_job_on_a_base_uses_the_cached_base_and_ends_with_the_same_bytes(workspace: Workspace) -> None:
    cache = QuantizedCache(workspace.settings.cache_dir, workspace.settings.cache_bytes)
    attempts = [replace(make_inputs(workspace, workspace.submit()), cache=cache) for _ in range(2)]
    reporters = [AttemptRecorder() for _ in attempts]
    results = [run(inputs, reporter=reporter) for inputs, reporter in zip(attempts, reporters, strict=True)]
    assert [result["base"] for result in results] == ["quantized", "cached"]
    assert [reporter.messages for reporter in reporters] == [["base: quantized"], ["base: cached"]]
    assert reporters[0].plan == reporters[1].plan
    first, second = (published_bytes(inputs, "adapter_model.safetensors") for inputs in attempts)
    assert first == second


def test_documents_that_cannot_be_kept_apart_run_alone(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = spy_on_loop(monkeypatch)
    monkeypatch.setattr(workers.warm_base, "isolate_documents", lambda model: "alone")
    run(make_inputs(workspace, workspace.submit()))
    assert arguments["network"].isolation == "alone"


def test_the_plan_is_chosen_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_inputs(workspace, workspace.submit(max_steps=4, micro_batch_tokens=64))
    first_reporter = interrupted_after(2, first)
    assert first_reporter.plan["gradient_checkpointing"] is False
    # A choice in the next attempt would differ, because nothing fits into memory.
    monkeypatch.setattr(Network, "fits", lambda *_: False)
    monkeypatch.setattr(Network, "_choose_paths", lambda *_: pytest.fail("the kernel paths were chosen again"))
    reporter = AttemptRecorder()
    run(next_inputs(first, first_reporter.plan, workspace), reporter=reporter)
    assert reporter.plan == first_reporter.plan


def test_a_resume_in_another_environment_names_the_differences(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_inputs(workspace, workspace.submit(max_steps=4))
    first_reporter = interrupted_after(2, first)
    environment = workers.trainer.load.describe_environment(torch.device("cpu"))
    other_environment = environment | {"versions": environment["versions"] | {"peft": "9.9"}}
    monkeypatch.setattr(workers.trainer.load, "describe_environment", lambda _: other_environment)
    reporter = AttemptRecorder()
    second = next_inputs(first, first_reporter.plan, workspace)
    result = run(second, reporter=reporter)
    (warning,) = [warning for warning in result["warnings"] if "instead of" in warning]
    assert warning in reporter.messages
    assert "from step 3 on, peft is 9.9 instead of" in warning
    (change,) = Manifest.model_validate_json(published_bytes(second, "manifest.json")).plan["changes"]
    assert (change["what"], change["to"]) == ("peft", "9.9")
