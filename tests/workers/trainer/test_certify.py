"""The certificate: the published bytes give the loss that was trained."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import workers.trainer.certify
from qlora_service.artifacts.store import job_key
from qlora_service.domain.jobs import FailureReason
from qlora_service.errors import JobFailed
from qlora_service.models.adapters import load_adapter
from qlora_service.models.base.load import LoadedBase, load_cached_base
from qlora_service.training.loop import EvaluationMetrics
from tests.workers.trainer._attempts import AttemptRecorder, make_inputs, run
from tests.workspace import Workspace
from workers.trainer.certify import check_loss


def test_a_published_file_that_changed_fails_the_job(workspace: Workspace) -> None:
    inputs = make_inputs(workspace, workspace.submit())

    def flip_a_bit(phase: str) -> None:
        if phase == "certifying":
            key = job_key(inputs.job.id, inputs.token, "adapter_model.safetensors")
            path = inputs.artifacts.local_copy(key, inputs.scratch)
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

    with pytest.raises(JobFailed, match=r"adapter_model\.safetensors") as failure:
        run(inputs, flip_a_bit)
    assert failure.value.details["reason"] == FailureReason.CERTIFICATE


def test_a_changed_base_is_loaded_again(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(workspace, workspace.submit())
    bases: list[torch.nn.Module] = []

    def keep(*arguments: Any) -> LoadedBase:
        loaded = load_cached_base(*arguments)
        bases.append(loaded.model)
        return loaded

    monkeypatch.setattr("workers.warm_base.load_cached_base", keep)

    def change(phase: str) -> None:
        if phase == "certifying":
            bases[0].get_input_embeddings().weight.data[7] += 1.0  # type: ignore[operator]

    certificate = run(inputs, change)["certificate"]
    assert isinstance(certificate, dict)
    assert len(bases) == 2
    assert certificate["base_reused"] is False
    assert certificate["difference"] == 0.0


@pytest.mark.parametrize("loss", [0.5011, float("nan")])
def test_a_reloaded_loss_that_differs_fails_the_job(loss: float) -> None:
    with pytest.raises(JobFailed, match="not what was trained") as failure:
        check_loss(loss, 0.5)
    assert failure.value.details["reason"] == FailureReason.CERTIFICATE


def test_the_certified_loss_is_that_of_the_published_adapter(workspace: Workspace) -> None:
    """Weights that are lost between training and publishing fail the job."""
    inputs = make_inputs(workspace, workspace.submit())

    class Forgetful(AttemptRecorder):
        def on_evaluation(self, metrics: EvaluationMetrics) -> None:
            if metrics.step == 3:
                for value in gc.get_objects():
                    if type(value) is torch.nn.Parameter and value.requires_grad:
                        value.data.zero_()

    with pytest.raises(JobFailed, match="not what was trained"):
        run(inputs, reporter=Forgetful())


@pytest.mark.parametrize("damage", [0.5, float("nan")])
def test_an_adapter_that_reloads_differently_fails_the_job(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, damage: float
) -> None:
    def damaged(base: Any, directory: Path) -> Any:
        model = load_adapter(base, directory)
        next(p for name, p in model.named_parameters() if "lora_B" in name).data.add_(damage)
        return model

    monkeypatch.setattr(workers.trainer.certify, "load_adapter", damaged)
    with pytest.raises(JobFailed, match="not what was trained") as failure:
        run(make_inputs(workspace, workspace.submit()))
    assert failure.value.details["reason"] == FailureReason.CERTIFICATE


def test_the_certificate_is_of_the_published_bytes_alone(workspace: Workspace) -> None:
    inputs = make_inputs(workspace, workspace.submit())

    def delete_local_files(phase: str) -> None:
        if phase == "certifying":
            shutil.rmtree(inputs.scratch / "adapter")

    certificate = run(inputs, delete_local_files)["certificate"]
    assert isinstance(certificate, dict)
    assert certificate["difference"] == 0.0
