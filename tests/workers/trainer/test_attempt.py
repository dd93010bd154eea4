"""Whole attempts, in this process: published files, results and warnings."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import workers.trainer.prepare
from qlora_service.artifacts.manifest import Manifest
from qlora_service.domain.metrics import metrics_csv
from qlora_service.errors import NotFound
from qlora_service.specs import JobSpec, parse_spec
from qlora_service.training.loop import Outcome, StepMetrics
from qlora_service.training.objectives import Evaluation
from tests.workers.trainer._attempts import (
    LABELLED,
    PAIRS,
    TEXTS,
    AttemptRecorder,
    make_inputs,
    published_bytes,
    run,
    spy_on_loop,
)
from tests.workspace import ROWS, Workspace
from workers.trainer.attempt import outcome_warnings, totals


def test_everything_is_published_and_the_certificate_holds(workspace: Workspace) -> None:
    inputs = make_inputs(workspace, workspace.submit())
    result = run(inputs)
    manifest = Manifest.model_validate_json(published_bytes(inputs, "manifest.json"))
    assert {file.name for file in manifest.files} >= {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja", "metrics.jsonl",
        "held_out.jsonl", "rows.jsonl", "README.md",
    }  # fmt: skip
    for file in manifest.files:
        content = published_bytes(inputs, file.name)
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
    inputs = make_inputs(workspace, workspace.service.jobs.submit(parse_spec(spec)).job.id)
    certificate = run(inputs)["certificate"]
    assert isinstance(certificate, dict)
    assert certificate["difference"] == 0.0
    lines = [json.loads(line) for line in published_bytes(inputs, "rows.jsonl").splitlines()]
    assert {row["line"] for row in lines} <= set(range(1, len(rows) + 1))
    assert [row["last_loss"] for row in lines] == sorted((row["last_loss"] for row in lines), reverse=True)


def test_two_attempts_at_a_job_publish_the_same_adapter_beside_each_other(workspace: Workspace) -> None:
    job_id = workspace.submit()
    first, second = make_inputs(workspace, job_id, 1), make_inputs(workspace, job_id, 2)
    run(first)
    torch.manual_seed(99)
    run(second)
    name = "adapter_model.safetensors"
    assert published_bytes(first, name) == published_bytes(second, name)


def test_an_error_of_the_observer_ends_the_attempt(workspace: Workspace) -> None:
    inputs = make_inputs(workspace, workspace.submit())

    class Stopper(AttemptRecorder):
        def on_step(self, metrics: StepMetrics) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(inputs, reporter=Stopper())
    with pytest.raises(NotFound):
        published_bytes(inputs, "manifest.json")


def test_every_part_of_the_spec_is_used(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = spy_on_loop(monkeypatch)
    times: list[object] = []
    renderer = workers.trainer.prepare.Renderer
    monkeypatch.setattr(
        workers.trainer.prepare,
        "Renderer",
        lambda *given, **more: (times.append(given[2]), renderer(*given, **more))[1],
    )
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
    inputs = make_inputs(workspace, workspace.service.jobs.submit(parse_spec(spec)).job.id)
    run(inputs)
    assert arguments["evaluate_every"] == 11
    assert times == [inputs.job.created_at]
    assert splits == [(40, 0.2, 5, 7)]
    assert len(arguments["held_out"]) == 5
    base = arguments["network"].model.get_base_model()
    assert not getattr(base, "is_quantized", False)
    assert base.get_input_embeddings().weight.dtype == torch.float32
    manifest = Manifest.model_validate_json(published_bytes(inputs, "manifest.json"))
    assert manifest.plan["compute_dtype"] == "float32"
    records = [json.loads(line) for line in published_bytes(inputs, "held_out.jsonl").splitlines()]
    assert all(all(record["trained"]) for record in records)
    template = (workspace.catalog.get("tiny").path / "chat_template.jinja").read_bytes()
    assert published_bytes(inputs, "chat_template.jinja") == template


def outcome(before: float, after: float, steps: int = 10, best_step: int = 10, skipped_steps: int = 0) -> Outcome:
    return Outcome(Evaluation(before, 0.5), Evaluation(after, 0.5), steps, best_step, skipped_steps)


def test_a_successful_job_has_no_warning() -> None:
    assert outcome_warnings(outcome(2.0, 1.9), 10) == []


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (outcome(2.0, 7.28), "rose from 2.0000 to 7.2800"),
        (outcome(2.0, 2.0, best_step=0), "no step lowered the held-out loss"),
        (outcome(2.0, 1.9, steps=8, best_step=4), "stopped early after 8 of 10 steps"),
        (outcome(2.0, 1.9, skipped_steps=2), "2 of 10 steps were skipped"),
    ],
)
def test_a_problem_of_the_training_is_a_warning(result: Outcome, text: str) -> None:
    (warning,) = outcome_warnings(result, 10)
    assert text in warning


def test_totals_are_those_of_all_steps(tmp_path: Path) -> None:
    records = [{"step": 0, "eval_loss": 3.0, "eval_accuracy": 0.5}]
    records += [{"step": step, "loss": 2.0, "tokens": 10 * step} for step in (1, 2)]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    for fraction, holds_out in ((0.05, True), (0.0, False)):
        spec = JobSpec.model_validate({"base_model": "tiny", "validation": {"fraction": fraction}})
        size = len(metrics_csv(records, holds_out=holds_out))
        assert totals(file, spec) == {"tokens": 30, "results_bytes": size}
