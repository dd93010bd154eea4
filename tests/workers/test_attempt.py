"""One attempt, in this process: what it publishes, and what it refuses to call a success."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_service.artifacts.manifest import Manifest
from qlora_service.artifacts.store import ArtifactStore, job_key
from qlora_service.errors import InvalidModel, JobFailed, NotFound
from qlora_service.jobs import FailureReason
from qlora_service.models.nf4 import load_base
from qlora_service.training.loop import EvaluationMetrics, Losses, StepMetrics
from tests.tiny_training import Recorder
from tests.workspace import Workspace
from workers.attempt import AttemptInputs, certify, run_attempt
from workers.trainer import as_failure


@pytest.fixture
def workspace(tmp_path: Path, tiny_model: Path) -> Workspace:
    return Workspace(tmp_path / "data", tiny_model)


def attempt(workspace: Workspace, job_id: str, token: int = 1) -> AttemptInputs:
    job = workspace.service.get_job(job_id)
    scratch = workspace.settings.tmp_dir / f"{job_id}-{token}"
    scratch.mkdir(parents=True)
    return AttemptInputs(
        job=job,
        token=token,
        dataset=workspace.service.get_dataset(job.dataset_id),
        base=workspace.catalog.get("tiny"),
        artifacts=ArtifactStore(workspace.settings.resolved_artifact_url),
        scratch=scratch,
        needs_gpu=False,
    )


def run(inputs: AttemptInputs, enter_phase: Callable[[str, int | None], None] = lambda *_: None) -> dict[str, object]:
    metrics_file = inputs.scratch / "metrics.jsonl"
    metrics_file.write_text('{"step": 0}\n')
    return run_attempt(inputs, Recorder(), enter_phase, metrics_file)


def published(inputs: AttemptInputs, name: str) -> bytes:
    return b"".join(inputs.artifacts.read(job_key(inputs.job.id, inputs.token, name)))


def test_everything_is_published_and_the_certificate_holds(workspace: Workspace) -> None:
    inputs = attempt(workspace, workspace.submit())
    result = run(inputs)
    manifest = Manifest.model_validate_json(published(inputs, "manifest.json"))
    assert {file.name for file in manifest.files} >= {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja", "metrics.jsonl",
        "held_out.jsonl", "README.md",
    }  # fmt: skip
    for file in manifest.files:
        content = published(inputs, file.name)
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.bytes, file.sha256)
    assert manifest.base_model["weights_sha256"] == workspace.catalog.get("tiny").weights_sha256
    assert manifest.dataset["sha256"] == inputs.dataset.sha256
    assert manifest.spec["training"]["max_steps"] == 3
    assert manifest.versions["bitsandbytes"]
    assert manifest.held_out["rows"] == 2
    certificate = result["certificate"]
    assert isinstance(certificate, dict)
    assert certificate["difference"] == 0.0
    assert certificate["base_reused"] is True
    assert certificate["held_out_loss"] == manifest.held_out["loss_after"]


def test_published_files_name_no_path_of_this_machine(workspace: Workspace) -> None:
    inputs = attempt(workspace, workspace.submit())
    run(inputs)
    config = json.loads(published(inputs, "adapter_config.json"))
    assert config["base_model_name_or_path"] == "tiny"
    data_dir = str(workspace.settings.data_dir).encode()
    manifest = Manifest.model_validate_json(published(inputs, "manifest.json"))
    for name in [*(file.name for file in manifest.files), "manifest.json"]:
        assert data_dir not in published(inputs, name), name


def test_two_attempts_at_a_job_publish_the_same_adapter_beside_each_other(workspace: Workspace) -> None:
    job_id = workspace.submit()
    first, second = attempt(workspace, job_id, 1), attempt(workspace, job_id, 2)
    run(first)
    torch.manual_seed(99)
    run(second)
    name = "adapter_model.safetensors"
    assert published(first, name) == published(second, name)


def test_a_published_file_that_changed_is_no_success(workspace: Workspace) -> None:
    inputs = attempt(workspace, workspace.submit())

    def flip_a_bit(phase: str, _: int | None) -> None:
        if phase == "certifying":
            key = job_key(inputs.job.id, inputs.token, "adapter_model.safetensors")
            path = inputs.artifacts.local_copy(key, inputs.scratch)
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

    with pytest.raises(JobFailed, match=r"adapter_model\.safetensors") as failure:
        run(inputs, flip_a_bit)
    assert failure.value.details["reason"] == FailureReason.CERTIFICATE


def test_rows_over_the_limit_stop_the_attempt_before_the_model_is_loaded(workspace: Workspace) -> None:
    inputs = attempt(workspace, workspace.submit())
    tight = inputs.job.spec.training.model_copy(update={"max_seq_len_tokens": 9})
    job = inputs.job.__class__(**{**vars(inputs.job), "spec": inputs.job.spec.model_copy(update={"training": tight})})
    phases: list[str] = []
    with pytest.raises(JobFailed, match="40 rows are longer") as failure:
        run(
            AttemptInputs(**{**vars(inputs), "job": job}),
            lambda phase, _: phases.append(phase),
        )
    assert failure.value.details["reason"] == FailureReason.INVALID_INPUT
    assert failure.value.findings[0].line == 1
    assert phases == ["rendering"]


def test_a_changed_base_is_loaded_anew(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = attempt(workspace, workspace.submit())
    bases: list[torch.nn.Module] = []

    def keep(*arguments: Any) -> Any:
        bases.append(load_base(*arguments))
        return bases[-1]

    monkeypatch.setattr("workers.attempt.load_base", keep)

    def change(phase: str, _: int | None) -> None:
        if phase == "certifying":
            bases[0].get_input_embeddings().weight.data[7] += 1.0  # type: ignore[operator]

    certificate = run(inputs, change)["certificate"]
    assert isinstance(certificate, dict)
    assert len(bases) == 2
    assert certificate["base_reused"] is False
    assert certificate["difference"] == 0.0


@pytest.mark.parametrize("loss", [0.5011, float("nan")])
def test_a_reloaded_loss_that_differs_is_no_success(loss: float) -> None:
    with pytest.raises(JobFailed, match="not what was trained") as failure:
        certify(loss, Losses(before=2.0, after=0.5))
    assert failure.value.details["reason"] == FailureReason.CERTIFICATE


def test_the_certified_loss_is_that_of_the_published_adapter(workspace: Workspace) -> None:
    """Weights that are lost between training and publishing fail the job."""
    inputs = attempt(workspace, workspace.submit())

    class Forgetful(Recorder):
        def on_evaluation(self, metrics: EvaluationMetrics) -> None:
            if metrics.step == 3:
                for value in gc.get_objects():
                    if type(value) is torch.nn.Parameter and value.requires_grad:
                        value.data.zero_()

    metrics_file = inputs.scratch / "metrics.jsonl"
    metrics_file.touch()
    with pytest.raises(JobFailed, match="not what was trained"):
        run_attempt(inputs, Forgetful(), lambda *_: None, metrics_file)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), FailureReason.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), FailureReason.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), FailureReason.OUT_OF_MEMORY),
        (MemoryError(), FailureReason.OUT_OF_MEMORY),
        (InvalidModel("bad"), FailureReason.INVALID_INPUT),
        (ValueError("odd, at /home/someone"), FailureReason.INTERNAL),
    ],
)
def test_failures_are_typed(error: Exception, reason: FailureReason) -> None:
    failure = as_failure(error, "logs/x.log")
    assert failure.details["reason"] == reason
    assert "/home/someone" not in failure.message


def test_a_typed_failure_stays_itself() -> None:
    failed = JobFailed("x", reason=FailureReason.NOT_FINITE)
    assert as_failure(failed, "logs/x.log") is failed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to be used")
def test_a_gpu_that_torch_cannot_use_is_no_reason_to_train_on_the_cpu(workspace: Workspace) -> None:
    inputs = attempt(workspace, workspace.submit())
    with pytest.raises(JobFailed, match="cannot use it") as failure:
        run(AttemptInputs(**{**vars(inputs), "needs_gpu": True}))
    assert failure.value.details["reason"] == FailureReason.DEVICE_UNAVAILABLE


def test_an_observer_may_stop_the_attempt(workspace: Workspace) -> None:
    inputs = attempt(workspace, workspace.submit())

    class Stopper(Recorder):
        def on_step(self, metrics: StepMetrics) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_attempt(inputs, Stopper(), lambda *_: None, inputs.scratch / "metrics.jsonl")
    with pytest.raises(NotFound):
        published(inputs, "manifest.json")
