"""One attempt, in this process: what it publishes, and what it refuses to call a success."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

import workers.trainer.certify
import workers.trainer.load
import workers.trainer.prepare
import workers.trainer.train
import workers.warm_base
from qlora_service.artifacts.manifest import Manifest
from qlora_service.artifacts.store import ArtifactStore, job_key
from qlora_service.domain.jobs import FailureReason
from qlora_service.domain.metrics import metrics_csv
from qlora_service.errors import Interrupted, InvalidModel, JobFailed, NotFound
from qlora_service.models.adapters import load_adapter
from qlora_service.models.base.load import LoadedBase, load_cached_base
from qlora_service.models.base.quantized_cache import QuantizedCache
from qlora_service.specs import JobSpec, Training, parse_spec
from qlora_service.training.checkpoint.checkpoints import Checkpoints
from qlora_service.training.checkpoint.disk_reserve import DiskReserve
from qlora_service.training.loop import EvaluationMetrics, Outcome, StepMetrics, Workload
from qlora_service.training.network.network import Network
from qlora_service.training.objectives import Evaluation
from qlora_service.training.sizes import DATABASE_BYTES
from tests.tiny_training import Recorder
from tests.workspace import ROWS, Workspace, job_spec
from workers.disk_space import is_disk_full
from workers.trainer.attempt import outcome_warnings, run_attempt, totals
from workers.trainer.certify import check_loss
from workers.trainer.context import AttemptContext, AttemptInputs
from workers.trainer.load import make_network
from workers.trainer.trainer import as_failure
from workers.warm_base import BaseHolder


def attempt(workspace: Workspace, job_id: str, token: int = 1) -> AttemptInputs:
    job = workspace.service.jobs.get(job_id)
    scratch = workspace.settings.tmp_dir / f"{job_id}-{token}"
    scratch.mkdir(parents=True)
    return AttemptInputs(
        job=job,
        token=token,
        dataset=workspace.service.datasets.get(job.dataset_id),
        base=workspace.catalog.get("tiny"),
        artifacts=ArtifactStore(workspace.settings.resolved_artifact_url),
        scratch=scratch,
        checkpoint_dir=workspace.settings.checkpoint_dir / job_id,
        checkpoint_s=60.0,
        needs_gpu=False,
    )


class AttemptRecorder(Recorder):
    """A reporter that keeps what it is told; `on_phase` is called with every phase."""

    def __init__(self, on_phase: Callable[[str], object] = lambda phase: None) -> None:
        super().__init__()
        self._on_phase = on_phase
        self.plan: dict[str, Any] = {}
        self.messages: list[str | None] = []
        self.resumed_at: int | None = None
        self.saved_steps: list[int] = []
        self.figures: dict[str, Any] = {}
        self.expected: tuple[int, int, dict[str, float]] | None = None

    def enter_phase(self, phase: str, total_steps: int | None) -> None:
        self._on_phase(phase)

    def choose_plan(self, plan: dict[str, Any], message: str | None = None) -> None:
        self.plan = dict(plan)
        self.messages.append(message)

    def resumed(self, step: int, metrics: bytes, notes: Sequence[str]) -> None:
        self.resumed_at = step
        self.messages += notes

    def saved(self, step: int) -> None:
        self.saved_steps.append(step)

    def note(self, **figures: Any) -> None:
        self.figures |= {name: figure for name, figure in figures.items() if figure is not None}

    def expect(self, total_steps: int, evaluate_every: int, later: Mapping[str, float]) -> None:
        self.expected = (total_steps, evaluate_every, dict(later))

    def finish(self) -> dict[str, Any]:
        return dict(self.figures)


def run(
    inputs: AttemptInputs,
    on_phase: Callable[[str], object] = lambda phase: None,
    *,
    reporter: AttemptRecorder | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    metrics_file = inputs.scratch / "metrics.jsonl"
    metrics_file.write_text('{"step": 0}\n')
    reserve = DiskReserve(inputs.checkpoint_dir / "ballast")
    return run_attempt(
        AttemptContext(inputs, reporter or AttemptRecorder(on_phase), check, reserve, metrics_file, BaseHolder())
    )


def published(inputs: AttemptInputs, name: str) -> bytes:
    return b"".join(inputs.artifacts.read(job_key(inputs.job.id, inputs.token, name)))


def test_everything_is_published_and_the_certificate_holds(workspace: Workspace) -> None:
    inputs = attempt(workspace, workspace.submit())
    result = run(inputs)
    manifest = Manifest.model_validate_json(published(inputs, "manifest.json"))
    assert {file.name for file in manifest.files} >= {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja", "metrics.jsonl",
        "held_out.jsonl", "rows.jsonl", "README.md",
    }  # fmt: skip
    for file in manifest.files:
        content = published(inputs, file.name)
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.bytes, file.sha256)
    assert manifest.base_model["weights_sha256"] == workspace.catalog.get("tiny").weights_sha256
    assert manifest.dataset["sha256"] == inputs.dataset.sha256
    assert manifest.spec["training"]["max_steps"] == 3
    assert manifest.versions["bitsandbytes"]
    assert manifest.held_out["rows"] == 2
    assert manifest.plan["isolation"] == "per_document"
    certificate = result["certificate"]
    assert isinstance(certificate, dict)
    assert certificate["difference"] == 0.0
    assert certificate["base_reused"] is True
    assert certificate["held_out_loss"] == manifest.held_out["loss_after"]


PAIRS = [
    {"prompt": f"What is {n} plus one?", "chosen": f"It is {n + 1}.", "rejected": f"No idea, perhaps {n}."}
    for n in range(24)
]
LABELLED = [
    {"prompt": f"What is {n} plus one?", "completion": f"It is {n + n % 2}.", "label": n % 2 == 1} for n in range(24)
]
TEXTS = [{"text": f"The river has {n} bridges and the house has {n + 1} windows."} for n in range(24)]


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (PAIRS, {"objective": {"type": "dpo"}}),
        (PAIRS, {"objective": {"type": "orpo"}}),
        (LABELLED, {"objective": {"type": "kto"}}),
        (TEXTS, {"training": {"neftune_noise_alpha": 5, "optim": "paged_lion_8bit"}}),
        (ROWS, {"adapter": {"method": "adalora", "target_r": 2, "init_r": 4}}),
        (ROWS, {"adapter": {"method": "prompt_tuning", "num_virtual_tokens": 4}, "quantization": {"type": "int8"}}),
        (ROWS, {"adapter": {"method": "prefix_tuning", "num_virtual_tokens": 4}}),
        (ROWS, {"adapter": {"r": 4, "use_dora": True}, "quantization": {"type": "fp4"}}),
        (ROWS, {"adapter": {"r": 4, "init_lora_weights": "olora"}}),
        (ROWS, {"adapter": {"r": 4, "trainable_token_indices": [3, 4]}, "training": {"loraplus_lr_ratio": 16}}),
        (ROWS, {"recipe": "lit-llama-alpaca", "training": {"max_steps": 3, "warmup_steps": 1, "batch_size": 8}}),
        (ROWS, {"training": {"max_steps": 9, "learning_rate": 0.5, "load_best_model_at_end": True}}),
    ],
)
def test_every_kind_of_job_ends_certified(
    workspace: Workspace, rows: list[dict[str, Any]], parts: dict[str, Any]
) -> None:
    training = {"max_steps": 3, "batch_size": 4, "max_seq_len_tokens": 128} | parts.pop("training", {})
    spec = {"base_model": "tiny", "dataset": {"rows": rows}, "training": training, **parts}
    inputs = attempt(workspace, workspace.service.jobs.submit(parse_spec(spec)).job.id)
    certificate = run(inputs)["certificate"]
    assert isinstance(certificate, dict)
    assert certificate["difference"] == 0.0
    lines = [json.loads(line) for line in published(inputs, "rows.jsonl").splitlines()]
    assert {row["line"] for row in lines} <= set(range(1, len(rows) + 1))
    assert [row["last_loss"] for row in lines] == sorted((row["last_loss"] for row in lines), reverse=True)


def test_answers_are_published_side_by_side(workspace: Workspace) -> None:
    spec = {
        "base_model": "tiny",
        "dataset": {"rows": ROWS},
        "training": {"max_steps": 2, "batch_size": 4, "max_seq_len_tokens": 128},
        "evaluation": {"generate_rows": 2, "questions": ["How many days has a week?"], "max_new_tokens": 4},
    }
    inputs = attempt(workspace, workspace.service.jobs.submit(parse_spec(spec)).job.id)
    scores = run(inputs)["generation"]
    report = json.loads(published(inputs, "generation.json"))
    assert report["scores"] == scores
    assert isinstance(scores, dict)
    assert scores["base"].keys() == scores["adapter"].keys() >= {"exact_match", "bleu", "rougeL"}
    assert len(report["rows"]) == 2
    assert report["questions"][0]["question"] == "How many days has a week?"


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


def test_rows_over_the_limit_stop_the_attempt_before_the_model_is_loaded(workspace: Workspace) -> None:
    inputs = attempt(workspace, workspace.submit())
    tight = inputs.job.spec.training.model_copy(update={"max_seq_len_tokens": 9})
    job = inputs.job.__class__(**{**vars(inputs.job), "spec": inputs.job.spec.model_copy(update={"training": tight})})
    phases: list[str] = []
    with pytest.raises(JobFailed, match="40 rows are longer") as failure:
        run(
            AttemptInputs(**{**vars(inputs), "job": job}),
            phases.append,
        )
    assert failure.value.details["reason"] == FailureReason.INVALID_INPUT
    assert failure.value.findings[0].line == 1
    assert phases == ["rendering"]


def test_a_changed_base_is_loaded_anew(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = attempt(workspace, workspace.submit())
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


def test_the_next_job_on_a_base_finds_it_quantized_and_ends_with_the_same_bytes(workspace: Workspace) -> None:
    cache = QuantizedCache(workspace.settings.cache_dir, workspace.settings.cache_bytes)
    attempts = [replace(attempt(workspace, workspace.submit()), cache=cache) for _ in range(2)]
    reporters = [AttemptRecorder() for _ in attempts]
    results = [run(inputs, reporter=reporter) for inputs, reporter in zip(attempts, reporters, strict=True)]
    assert [result["base"] for result in results] == ["quantized", "cached"]
    assert [reporter.messages for reporter in reporters] == [["base: quantized"], ["base: cached"]]
    assert reporters[0].plan == reporters[1].plan
    first, second = (published(inputs, "adapter_model.safetensors") for inputs in attempts)
    assert first == second


@pytest.mark.parametrize("loss", [0.5011, float("nan")])
def test_a_reloaded_loss_that_differs_is_no_success(loss: float) -> None:
    with pytest.raises(JobFailed, match="not what was trained") as failure:
        check_loss(loss, 0.5)
    assert failure.value.details["reason"] == FailureReason.CERTIFICATE


def outcome(before: float, after: float, steps: int = 10, best_step: int = 10, skipped_steps: int = 0) -> Outcome:
    return Outcome(Evaluation(before, 0.5), Evaluation(after, 0.5), steps, best_step, skipped_steps)


def test_a_job_that_went_well_needs_no_warning() -> None:
    assert outcome_warnings(outcome(2.0, 1.9), 10) == []


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (outcome(2.0, 7.28), "rose from 2.0000 to 7.2800"),
        (outcome(2.0, 2.0, best_step=0), "no step lowered the held-out loss"),
        (outcome(2.0, 1.9, steps=8, best_step=4), "stopped early after 8 of 10 steps"),
        (outcome(2.0, 1.9, skipped_steps=2), "2 of 10 steps were skipped"),
    ],
)
def test_what_the_user_should_know_is_a_warning(result: Outcome, said: str) -> None:
    (warning,) = outcome_warnings(result, 10)
    assert said in warning


def test_the_certified_loss_is_that_of_the_published_adapter(workspace: Workspace) -> None:
    """Weights that are lost between training and publishing fail the job."""
    inputs = attempt(workspace, workspace.submit())

    class Forgetful(AttemptRecorder):
        def on_evaluation(self, metrics: EvaluationMetrics) -> None:
            if metrics.step == 3:
                for value in gc.get_objects():
                    if type(value) is torch.nn.Parameter and value.requires_grad:
                        value.data.zero_()

    with pytest.raises(JobFailed, match="not what was trained"):
        run(inputs, reporter=Forgetful())


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

    class Stopper(AttemptRecorder):
        def on_step(self, metrics: StepMetrics) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(inputs, reporter=Stopper())
    with pytest.raises(NotFound):
        published(inputs, "manifest.json")


def spy_on_training(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `train` is called with."""
    seen: dict[str, Any] = {}
    real = workers.trainer.train.run_loop

    def spy(network: Any, objective: Any, workload: Workload, training: Training, *given: Any, **state: Any) -> Any:
        seen.update(vars(workload), network=network, training=training)
        seen["held_out"] = {example.line for example in workload.held_out}
        seen["first_a"] = {n: p.detach().clone() for n, p in network.model.named_parameters() if "lora_A" in n}
        seen["trained"] = {example.line for step in range(50) for example in workload.examples_of_step(step)}
        return real(network, objective, workload, training, *given, **state)

    monkeypatch.setattr(workers.trainer.train, "run_loop", spy)
    return seen


def test_held_out_rows_are_never_trained_on(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy_on_training(monkeypatch)
    run(attempt(workspace, workspace.submit()))
    assert len(seen["held_out"]) == 2
    assert seen["trained"] == set(range(1, 41)) - seen["held_out"]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_spec_reaches_the_training(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    seen = spy_on_training(monkeypatch)
    run(attempt(workspace, workspace.submit(seed=0)))
    first = seen["first_a"]
    wanted = {"max_steps": None, "epochs": 0.3, "seed": 7, "micro_batch_tokens": 77}
    run(attempt(workspace, workspace.submit(**wanted, gradient_checkpointing=checkpointing)))
    assert seen["total_steps"] == 3  # 11 of 38 rows, 4 a step
    assert seen["training"].micro_batch_tokens == 77
    assert seen["training"].seed == 7
    assert seen["network"].checkpointing is checkpointing
    assert not any(torch.equal(a, first[name]) for name, a in seen["first_a"].items())


def test_documents_that_cannot_be_kept_apart_run_alone(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy_on_training(monkeypatch)
    monkeypatch.setattr(workers.warm_base, "isolate_documents", lambda model: "alone")
    run(attempt(workspace, workspace.submit()))
    assert seen["network"].isolation == "alone"


def test_gradients_that_stay_infinite_end_the_job_and_the_last_finite_adapter_is_kept(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = attempt(workspace, workspace.submit(max_steps=9))
    finite: list[dict[str, torch.Tensor]] = []

    def breaking_after_two_steps(*given: Any) -> Network:
        network = make_network(*given)
        learned = [p for p in network.model.parameters() if p.requires_grad]
        steps = 0

        def grow(gradient: torch.Tensor) -> torch.Tensor:
            nonlocal steps
            steps += 1
            if steps == 3:
                state = get_peft_model_state_dict(network.model)
                finite.append({name: tensor.clone() for name, tensor in state.items()})
            return gradient if steps <= 2 else gradient * float("inf")

        learned[1].register_hook(grow)
        return network

    monkeypatch.setattr(workers.trainer.load, "make_network", breaking_after_two_steps)
    with pytest.raises(JobFailed, match="step 5, and the 2 before it") as failure:
        run(inputs)
    assert failure.value.details["reason"] == FailureReason.NOT_FINITE
    assert failure.value.details["kept_step"] == 2
    assert len(failure.value.details["lines"]) == 4
    (inputs.scratch / "kept").write_bytes(published(inputs, "adapter_model.safetensors"))
    kept = load_file(inputs.scratch / "kept")
    assert kept.keys() == finite[0].keys()
    assert all(torch.equal(tensor, finite[0][name]) for name, tensor in kept.items())
    assert json.loads(published(inputs, "manifest.json"))["held_out"]["loss_after"] > 0


def test_without_all_files_there_is_no_manifest(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = attempt(workspace, workspace.submit())
    put_file = ArtifactStore.put_file

    def full_disk(store: ArtifactStore, key: str, path: Path) -> None:
        if key.endswith("tokenizer.json"):
            raise OSError(28, "No space left on device")
        put_file(store, key, path)

    monkeypatch.setattr(ArtifactStore, "put_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        run(inputs)
    with pytest.raises(NotFound):
        published(inputs, "manifest.json")


@pytest.mark.parametrize("damage", [0.5, float("nan")])
def test_an_adapter_that_reloads_differently_is_no_success(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, damage: float
) -> None:
    def spoilt(base: Any, directory: Path) -> Any:
        model = load_adapter(base, directory)
        next(p for name, p in model.named_parameters() if "lora_B" in name).data.add_(damage)
        return model

    monkeypatch.setattr(workers.trainer.certify, "load_adapter", spoilt)
    with pytest.raises(JobFailed, match="not what was trained") as failure:
        run(attempt(workspace, workspace.submit()))
    assert failure.value.details["reason"] == FailureReason.CERTIFICATE


def test_the_certificate_is_of_the_published_bytes_alone(workspace: Workspace) -> None:
    inputs = attempt(workspace, workspace.submit())

    def forget_local_files(phase: str) -> None:
        if phase == "certifying":
            shutil.rmtree(inputs.scratch / "adapter")

    certificate = run(inputs, forget_local_files)["certificate"]
    assert isinstance(certificate, dict)
    assert certificate["difference"] == 0.0


def test_every_part_of_the_spec_is_used(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:

    seen = spy_on_training(monkeypatch)
    now: list[object] = []
    renderer = workers.trainer.prepare.Renderer
    monkeypatch.setattr(workers.trainer.prepare, "Renderer", lambda *given: (now.append(given[2]), renderer(*given))[1])
    splits = []
    split = workers.trainer.prepare.split_rows
    monkeypatch.setattr(workers.trainer.prepare, "split_rows", lambda *given: (splits.append(given), split(*given))[1])
    spec = {
        "base_model": "tiny",
        "dataset": {"rows": ROWS},
        "validation": {"fraction": 0.2, "max_rows": 5},
        "quantization": {"type": "none", "compute_dtype": "float32"},
        "training": {"max_steps": 30, "batch_size": 1, "max_seq_len_tokens": 128, "train_on": "all", "seed": 7},
        "evaluation": {"every_steps": 11},
    }
    inputs = attempt(workspace, workspace.service.jobs.submit(parse_spec(spec)).job.id)
    run(inputs)
    assert seen["evaluate_every"] == 11
    assert now == [inputs.job.created_at]
    assert splits == [(40, 0.2, 5, 7)]
    assert len(seen["held_out"]) == 5
    base = seen["network"].model.get_base_model()
    assert not getattr(base, "is_quantized", False)
    assert base.get_input_embeddings().weight.dtype == torch.float32
    manifest = Manifest.model_validate_json(published(inputs, "manifest.json"))
    assert manifest.plan["compute_dtype"] == "float32"
    records = [json.loads(line) for line in published(inputs, "held_out.jsonl").splitlines()]
    assert all(all(record["trained"]) for record in records)
    template = (workspace.catalog.get("tiny").path / "chat_template.jinja").read_bytes()
    assert published(inputs, "chat_template.jinja") == template


def test_job_is_judged_with_the_dataset_it_names(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy_on_training(monkeypatch)
    rows = workspace.settings.tmp_dir / "judged.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"Ask {n}", "output": "Yes."}) + "\n" for n in range(5)))
    judged = workspace.service.datasets.upload(rows, filename=None)
    spec = job_spec(max_steps=1) | {"validation": {"dataset_id": judged.id, "max_rows": 3}}
    inputs = replace(attempt(workspace, workspace.submit_spec(spec)), validation=judged)
    result = run(inputs)
    assert result["held_out_rows"] == len(seen["held_out"]) == 3
    assert seen["held_out"] <= set(range(1, 6))
    assert seen["trained"] == set(range(1, 41))
    manifest = Manifest.model_validate_json(published(inputs, "manifest.json"))
    assert (manifest.dataset["trained_on"], manifest.dataset["validation_sha256"]) == (40, judged.sha256)
    assert len(published(inputs, "held_out.jsonl").splitlines()) == 3


def test_totals_are_those_of_all_steps(tmp_path: Path) -> None:
    records = [{"step": 0, "eval_loss": 3.0, "eval_accuracy": 0.5}]
    records += [{"step": step, "loss": 2.0, "tokens": 10 * step} for step in (1, 2)]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    for fraction, holds_out in ((0.05, True), (0.0, False)):
        spec = JobSpec.model_validate({"base_model": "tiny", "validation": {"fraction": fraction}})
        size = len(metrics_csv(records, holds_out=holds_out))
        assert totals(file, spec) == {"tokens": 30, "results_bytes": size}


# --- going on


def interrupted_after(step: int, inputs: AttemptInputs) -> AttemptRecorder:
    """Runs the attempt until `step` steps are done; what it was told."""
    reporter = AttemptRecorder()

    def check() -> None:
        if len(reporter.steps) >= step:
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        run(inputs, reporter=reporter, check=check)
    return reporter


def next_attempt(inputs: AttemptInputs, plan: dict[str, Any], workspace: Workspace) -> AttemptInputs:
    """The attempt after `inputs`, with the plan that was stored."""
    following = attempt(workspace, inputs.job.id, inputs.token + 1)
    return replace(following, job=replace(following.job, plan=plan))


def test_an_interrupted_attempt_is_taken_up_by_the_next_to_the_same_bytes(workspace: Workspace) -> None:
    undisturbed = attempt(workspace, workspace.submit(max_steps=6))
    run(undisturbed)
    first = attempt(workspace, workspace.submit(max_steps=6))
    told = interrupted_after(4, first)
    assert told.saved_steps == [4]
    second = next_attempt(first, told.plan, workspace)
    reporter = AttemptRecorder()
    result = run(second, reporter=reporter)
    assert reporter.resumed_at == 4
    assert [metrics.step for metrics in reporter.steps] == [5, 6]
    for name in ("adapter_model.safetensors", "rows.jsonl", "held_out.jsonl"):
        assert published(second, name) == published(undisturbed, name), name
    assert Manifest.model_validate_json(published(second, "manifest.json")).plan == told.plan
    assert result["warnings"] == []


def test_an_attempt_interrupted_after_the_training_does_none_of_it_again(workspace: Workspace) -> None:
    first = attempt(workspace, workspace.submit(max_steps=4))

    def stop(phase: str) -> None:
        if phase == "publishing":
            raise Interrupted("enough")

    told = AttemptRecorder(stop)
    with pytest.raises(Interrupted):
        run(first, reporter=told)
    reporter = AttemptRecorder()
    result = run(next_attempt(first, told.plan, workspace), reporter=reporter)
    assert reporter.steps == []
    assert (reporter.resumed_at, result["steps"], result["certificate"]["difference"]) == (4, 4, 0.0)


def test_an_attempt_after_one_that_left_no_checkpoint_begins_anew_by_its_plan_and_says_so(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = attempt(workspace, workspace.submit(max_steps=1, batch_size=8))
    told = AttemptRecorder()
    run(first, reporter=told)
    losses = Network.losses

    def limited(network: Network, documents: Any, **options: Any) -> Any:
        if network.model.training and sum(len(document.input_ids) for document in documents) > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(network, documents, **options)

    monkeypatch.setattr(Network, "losses", limited)
    shutil.rmtree(first.checkpoint_dir)
    reporter = AttemptRecorder()
    run(next_attempt(first, told.plan | {"micro_batch_tokens": 64}, workspace), reporter=reporter)
    assert reporter.resumed_at == 0
    assert reporter.plan["changes"] == []
    assert [metrics.step for metrics in reporter.steps] == [1]


def test_room_is_held_for_what_is_not_on_the_disk_yet_and_given_up_for_what_is_published(workspace: Workspace) -> None:
    first = attempt(workspace, workspace.submit(max_steps=4))
    held: list[dict[str, int]] = [{}, {}]

    def note(number: int, inputs: AttemptInputs) -> Callable[[str], object]:
        reserve = DiskReserve(inputs.checkpoint_dir / "ballast")
        return lambda phase: held[number].update({phase: reserve.held_bytes})

    def stop(phase: str) -> None:
        note(0, first)(phase)
        if phase == "publishing":
            raise Interrupted("enough")

    told = AttemptRecorder(stop)
    with pytest.raises(Interrupted):
        run(first, reporter=told)
    taken = Checkpoints(first.checkpoint_dir, 2).bytes_on_disk()
    second = next_attempt(first, told.plan, workspace)
    run(second, note(1, second))
    assert held[1]["training"] == held[0]["training"] - taken
    assert held[1]["training"] > DATABASE_BYTES
    assert (held[1]["publishing"] > 0, held[1]["certifying"]) == (True, 0)


def test_the_plan_is_chosen_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    first = attempt(workspace, workspace.submit(max_steps=4, micro_batch_tokens=64))
    told = interrupted_after(2, first)
    assert told.plan["gradient_checkpointing"] is False
    # The next attempt finds no memory and would choose otherwise, were it asked.
    monkeypatch.setattr(Network, "fits", lambda *_: False)
    monkeypatch.setattr(Network, "_choose_paths", lambda *_: pytest.fail("the ways were looked for again"))
    reporter = AttemptRecorder()
    run(next_attempt(first, told.plan, workspace), reporter=reporter)
    assert reporter.plan == told.plan


def test_going_on_elsewhere_says_what_differs(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    first = attempt(workspace, workspace.submit(max_steps=4))
    told = interrupted_after(2, first)
    here = workers.trainer.load.describe_environment(torch.device("cpu"))
    elsewhere = here | {"versions": here["versions"] | {"peft": "9.9"}}
    monkeypatch.setattr(workers.trainer.load, "describe_environment", lambda _: elsewhere)
    reporter = AttemptRecorder()
    second = next_attempt(first, told.plan, workspace)
    result = run(second, reporter=reporter)
    (warning,) = [warning for warning in result["warnings"] if "instead of" in warning]
    assert warning in reporter.messages
    assert "from step 3 on, peft is 9.9 instead of" in warning
    (change,) = Manifest.model_validate_json(published(second, "manifest.json")).plan["changes"]
    assert (change["what"], change["to"]) == ("peft", "9.9")


def test_running_out_of_memory_changes_the_plan_and_says_so(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, failed = Network.losses, []

    def out_of_memory_once(network: Network, documents: Any, **options: Any) -> Any:
        if network.model.training and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(network, documents, **options)

    inputs = attempt(workspace, workspace.submit(max_steps=3, batch_size=8))
    monkeypatch.setattr(Network, "losses", out_of_memory_once)
    monkeypatch.setattr(Network, "fits", lambda *_: True)
    reporter = AttemptRecorder()
    result = run(inputs, reporter=reporter)
    (change,) = reporter.plan["changes"]
    assert change["what"] == "micro_batch_tokens"
    assert reporter.plan["micro_batch_tokens"] == change["to"] < change["from"]
    assert any("micro_batch_tokens" in warning for warning in result["warnings"])
    assert Manifest.model_validate_json(published(inputs, "manifest.json")).plan == reporter.plan


def test_a_job_that_will_not_find_room_on_the_disk_does_not_begin(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(workspace.settings.data_dir).free
    monkeypatch.setattr(workers.trainer.train, "expected_bytes", lambda *_, **__: free)
    reporter = AttemptRecorder()
    with pytest.raises(OSError) as raised:  # noqa: PT011 - the number says it
        run(attempt(workspace, workspace.submit()), reporter=reporter)
    assert is_disk_full(raised.value)
    assert reporter.steps == reporter.evaluations == []


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EIO, "Input/output error"), False),
        (RuntimeError("Generic LocalFileSystem error: No space left on device (os error 28)"), True),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full"), True),
        (ValueError("odd"), False),
    ],
)
def test_a_full_disk_is_known_whoever_meets_it(error: Exception, is_full: bool) -> None:
    assert is_disk_full(error) is is_full
    wrapped = RuntimeError("it did not work")
    wrapped.__cause__ = error
    assert is_disk_full(wrapped) is is_full
